"""Pairs of neighbouring tokens: counted by hand, by the languages' shares, and the rows that they give an embedding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_unigram import dataset

from ekiden.modeling.associations import embedding_rows
from ekiden.tokens import cooccurrence
from ekiden.tokens.cooccurrence import count_associations
from ekiden.tokens.shares import plan_mixture


def test_pairs_count_by_their_distance_and_against_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cooccurrence, "WINDOW", 2)
    tokens = [0, 1, 1, 2, 0, 1] * 3
    mixture = plan_mixture({"a": len(tokens)}, 4, seed=1)
    table = np.zeros((4, 4))
    for distance in (1, 2):
        for left, right in zip(tokens, tokens[distance:]):
            table[left, right] += 1 / distance
            table[right, left] += 1 / distance
    frequency = table.sum(1)
    smooth = frequency**0.75 * frequency.sum() / (frequency**0.75).sum()
    expected = {}
    for a in range(3):
        for b in range(a, 3):
            both = [
                max(0.0, math.log(max(table[a, b], 1e-9) * frequency.sum() / (frequency[x] * smooth[y])))
                for x, y in ((a, b), (b, a))
            ]
            expected[a, b] = sum(both) / 2
    first, second, strength = count_associations(dataset(a=tokens), mixture)
    found = {(a, b): float(s) for a, b, s in zip(first, second, strength)}
    assert found == pytest.approx({pair: value for pair, value in expected.items() if value > 0})
    assert len(found) < len(expected), "some pair is rarer than chance"


def test_a_language_counts_by_its_share_however_long_it_is() -> None:
    weights = {"a": 0.5, "b": 0.5}
    long = dataset(a=[0, 1] * 50, b=[2, 3] * 5000)
    short = dataset(a=[0, 1] * 50, b=[2, 3] * 50)
    found, same = (
        count_associations(data, plan_mixture({"a": 100, "b": size}, 4, seed=1, weights=weights))
        for data, size in ((long, 10_000), (short, 100))
    )
    assert found[0].tolist() == same[0].tolist() and found[1].tolist() == same[1].tolist()
    assert found[2] == pytest.approx(same[2], abs=0.02)
    lonely = count_associations(dataset(a=[0]), plan_mixture({"a": 1}, 4, seed=1))
    assert [len(part) for part in lonely] == [0, 0, 0]


def test_tokens_in_the_same_company_get_neighbouring_rows() -> None:
    """Two groups of 6 tokens that only stand beside their own kind, and one token that nobody has seen."""
    rng = np.random.default_rng(0)
    tokens = [int(t) for group in rng.integers(0, 2, 400) for t in group * 6 + rng.integers(0, 6, 10)]
    data = dataset(a=tokens)
    data.vocab_size = 13
    pairs = count_associations(data, plan_mixture({"a": len(tokens)}, 4, seed=1))
    threads = torch.get_num_threads()
    rows, known = embedding_rows(pairs, 13, 8, seed=3)
    assert torch.get_num_threads() == threads
    assert known.tolist() == [True] * 12 + [False] and not rows[12].any()
    torch.testing.assert_close(rows[:12].norm(dim=1), torch.ones(12))
    alike = rows[:12] @ rows[:12].T
    assert alike[:6, :6].mean() > 0.5 and alike[6:, 6:].mean() > 0.5 and alike[:6, 6:].abs().mean() < 0.2
    torch.set_num_threads(3)
    try:
        again = embedding_rows(pairs, 13, 8, seed=3)[0]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(rows, again) and not torch.equal(rows, embedding_rows(pairs, 13, 8, seed=4)[0])
    # Of no text nothing is known.
    nothing = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    assert not embedding_rows(nothing, 13, 8, seed=3)[1].any()


def test_of_a_large_vocabulary_only_the_frequent_tokens_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rows are those of a vocabulary that has no others."""
    tokens = [0, 1, 2, 3] * 50 + [1, 4, 2, 5]
    data, mixture = dataset(a=tokens), plan_mixture({"a": len(tokens)}, 4, seed=1)
    data.vocab_size = 40
    assert 5 in count_associations(data, mixture)[1]
    monkeypatch.setattr(cooccurrence, "MOST_TOKENS", 4)
    pairs = count_associations(data, mixture)
    assert set(pairs[0]) | set(pairs[1]) == {0, 1, 2, 3}
    rows, known = embedding_rows(pairs, 40, 3, seed=1)
    assert known.tolist() == [True] * 4 + [False] * 36 and not rows[4:].any()
    assert torch.equal(rows[:4], embedding_rows(pairs, 4, 3, seed=1)[0])
