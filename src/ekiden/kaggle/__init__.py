"""Kaggle: a corpus shipped as datasets, a run carried over as many sessions as it takes, the model brought home."""
