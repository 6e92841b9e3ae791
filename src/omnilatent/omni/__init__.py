"""Any modality in, any modality out: one transformer for text, sound, pictures and video (docs/omni.md)."""
