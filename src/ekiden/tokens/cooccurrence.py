"""Which tokens stand near one another in the text that a run will read: how much more often than by chance.

`training.start` counts it where a run begins and gives it to the new model (`modeling.associations`), whose embedding then
begins with tokens of a kind beside each other and need not find that out. A pure function of shards and mixture, as
`tokens.unigram` is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ekiden.tokens.format import TokenDataset
from ekiden.tokens.mixture import Mixture

if TYPE_CHECKING:  # it needs torch, which this package does without
    from ekiden.modeling.associations import Associations

SAMPLE = 1_000_000
"""Tokens read of a language at most, from the beginning of its shards: 0.4 s each."""
WHOLE_SAMPLE = 8_000_000
"""Tokens read of all languages together, divided among them by the same number."""
WINDOW = 4
"""Distance up to which two tokens stand near one another; a pair counts 1/distance."""
SMOOTHING = 0.75
"""Power of the frequencies that a pair is compared with, so that rare tokens are not kin to everything (Levy, Goldberg &
Dagan 2015, Transactions of the ACL 3)."""
MOST_TOKENS = 65_536
"""The most frequent tokens, between which pairs count: of a larger vocabulary few others are met often enough."""


def count_associations(dataset: TokenDataset, mixture: Mixture) -> Associations:
    """Return which tokens stand near one another more often than their frequencies say.

    Languages count by their shares as the run begins.
    """
    shares = mixture.shares()
    most = min(SAMPLE, max(1, WHOLE_SAMPLE // len(shares)))
    size = dataset.vocab_size
    keys, counts = np.empty(0, dtype=np.int64), np.empty(0)
    for language, share in shares.items():
        stream = dataset.split(language, "train")
        tokens = stream.read(0, min(most, stream.tokens))
        for distance in range(1, min(WINDOW, len(tokens) - 1) + 1):
            left, right = tokens[:-distance], tokens[distance:]
            pairs = np.minimum(left, right) * size + np.maximum(left, right)
            found, times = np.unique(pairs, return_counts=True)
            keys, counts = _added(keys, counts, found, times * (share / distance / len(tokens)))
    return _above_chance(keys, counts, size)


def _added(
    keys: np.ndarray, counts: np.ndarray, more_keys: np.ndarray, more: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return both sets of counts as one, its keys rising."""
    keys, where = np.unique(np.concatenate([keys, more_keys]), return_inverse=True)
    return keys, np.bincount(where, weights=np.concatenate([counts, more]), minlength=len(keys))


def _above_chance(keys: np.ndarray, counts: np.ndarray, size: int) -> Associations:
    """Return the pairs that are more frequent than chance, from the counts of each key first * size + second."""
    first, second = np.divmod(keys, size)
    counts = np.where(first == second, 2 * counts, counts)  # as in the symmetric table
    once = np.where(first == second, 0.0, counts)
    frequency = np.bincount(first, counts, size) + np.bincount(second, once, size)
    total = frequency.sum()
    smooth = frequency**SMOOTHING
    smooth *= total / max(smooth.sum(), 1e-30)
    with np.errstate(divide="ignore"):
        log, log_smooth = np.log(frequency), np.log(smooth)
    joint = np.log(counts * total)
    strength = 0.5 * np.maximum(0.0, joint - log[first] - log_smooth[second])
    strength += 0.5 * np.maximum(0.0, joint - log[second] - log_smooth[first])
    kept = strength > 0
    if size > MOST_TOKENS:
        often = np.zeros(size, dtype=bool)
        often[np.argsort(-frequency, kind="stable")[:MOST_TOKENS]] = True
        kept &= often[first] & often[second]
    return first[kept], second[kept], strength[kept].astype(np.float32)
