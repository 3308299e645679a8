"""Tensors and bytes onto disk and back, verified; knows nothing of training."""
