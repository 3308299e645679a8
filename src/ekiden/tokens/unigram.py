"""How often each token occurs in the text that a run will read, counted from the beginning of every language's shards.

`training.start` gives it to a new model, which then begins with these probabilities and need not learn them. A pure function of
shards and mixture: every machine and every rank counts the same.
"""

from __future__ import annotations

import numpy as np

from ekiden.tokens.format import TokenDataset
from ekiden.tokens.mixture import Mixture

SAMPLE = 1_000_000
"""Tokens counted of a language: 0.01 s each, and every token of a share above 1e-4 is known to within a tenth."""


def unigram_probabilities(dataset: TokenDataset, mixture: Mixture) -> np.ndarray:
    """Return the probability of each token, float64 [vocabulary], all above 0: one is added to every count.

    Languages count by their shares as the run begins.
    """
    total = np.zeros(dataset.vocab_size)
    for language, share in mixture.shares().items():
        stream = dataset.split(language, "train")
        counts = 1.0 + np.bincount(stream.read(0, min(SAMPLE, stream.tokens)), minlength=dataset.vocab_size)
        total += share * counts / counts.sum()
    return total / total.sum()
