"""A model out of a preset, its loss without logits, and what the device can do."""

from ekiden.modeling.vector_math import settle_vector_math

# Here, so that no module of a model can be imported without.
settle_vector_math()
