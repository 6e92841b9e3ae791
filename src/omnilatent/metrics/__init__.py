"""The protocol by which codecs are compared, over `Codec` and tensors; it knows no model."""
