"""Gradient-free learning: neurons (an affine map and tanh) and stacks of them, from forward evaluations alone."""
