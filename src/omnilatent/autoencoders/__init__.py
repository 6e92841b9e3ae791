"""Image autoencoders: KL of our own recipes, and adapters for everybody else's."""
