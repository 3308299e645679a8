"""Counts of tokens in the shards: shares of the mixture, nothing of probability 0, the same twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ekiden.tokens import unigram
from ekiden.tokens.shares import plan_mixture
from ekiden.tokens.unigram import unigram_probabilities


class Stream:
    """A split whose tokens are given."""

    def __init__(self, tokens: list[int]) -> None:
        self.ids, self.tokens = np.array(tokens, dtype=np.int64), len(tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.ids[start : start + count]


def dataset(**languages: list[int]) -> Any:
    streams = {name: Stream(tokens) for name, tokens in languages.items()}
    return cast(Any, SimpleNamespace(vocab_size=4, split=lambda language, split: streams[language]))


def test_languages_count_by_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(a=[0] * 96, b=[1] * 192 + [2] * 204)
    mixture = plan_mixture({"a": 96, "b": 396}, 4, seed=1, weights={"a": 0.25, "b": 0.75})
    found = unigram_probabilities(data, mixture)
    assert found == pytest.approx(
        [
            0.25 * 0.97 + 0.75 / 400,
            0.25 * 0.01 + 0.75 * 193 / 400,
            0.25 * 0.01 + 0.75 * 205 / 400,
            0.25 * 0.01 + 0.75 / 400,
        ]
    )
    assert found.sum() == pytest.approx(1.0)
    assert np.array_equal(found, unigram_probabilities(data, mixture))
    # As much as is counted of each: here the 1s alone of b.
    monkeypatch.setattr(unigram, "SAMPLE", 192)
    assert unigram_probabilities(data, mixture)[2] == pytest.approx(0.25 * 0.01 + 0.75 / 196)


def test_a_language_that_is_left_out_does_not_count() -> None:
    data = dataset(a=[0] * 96, b=[3] * 96)
    only = plan_mixture({"a": 96, "b": 96}, 4, seed=1, weights={"a": 1.0})
    assert unigram_probabilities(data, only) == pytest.approx([0.97, 0.01, 0.01, 0.01])
