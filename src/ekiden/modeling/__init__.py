"""A model out of a preset, its loss without logits, and what the device can do."""
