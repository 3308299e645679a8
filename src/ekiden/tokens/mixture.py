"""The order of the data: a pure function from a sample's index to a language and a place in its text.

`plan_mixture` turns the languages' sizes into quotas once, at the start of a run; the `Mixture` is kept in every
checkpoint and decides everything after that. Position in the data is one integer: nothing to fast-forward, nothing
to save, the same on any number of machines, workers or microbatches.

Samples come in blocks of 4,096. Every block holds each language's exact quota, shuffled by (seed, block). Inside a
language, windows follow a permutation of their own in each epoch: a Feistel network with cycle walking (Black &
Rogaway 2002), O(1) in memory and time. Only integer arithmetic modulo 2^64 is used, none of numpy's generators,
whose streams may change between versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ekiden.errors import UsageError, UserError, nearest

BLOCK = 4096
"""Samples in a block: a share is kept to 1/4096, and each language appears in every block."""

_U64 = np.uint64
_ROUNDS = 6


def mix(values: np.ndarray) -> np.ndarray:
    """Return a well-mixed hash of each uint64 (the finalizer of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = values + _U64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
        return z ^ (z >> _U64(31))


def _key(*parts: object) -> int:
    """Return 64 bits that stand for `parts`, the same on every machine and in every version."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Return where the keyed permutation of range(size) sends each value.

    Args:
        values: uint64 below `size`, any shape; keys: uint64 of the same shape, equal keys being equal permutations.
    """
    if size == 1:
        return np.zeros_like(values)
    half = (max(2, (size - 1).bit_length()) + 1) // 2
    mask, shift = _U64((1 << half) - 1), _U64(half)
    result = values.copy()
    todo = np.ones(values.shape, dtype=bool)
    while todo.any():
        left, right = result[todo] >> shift, result[todo] & mask
        key = keys[todo]
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (mix(right ^ mix(key + _U64(round_number))) & mask)
        result[todo] = (left << shift) | right
        # Outside the range: walk on along the cycle; at most 4 tries on average.
        todo[todo] = result[todo] >= _U64(size)
    return result


@dataclass(frozen=True)
class Mixture:
    """The order of a run.

    Attributes:
        languages: names. quotas: samples of each in a block of 4,096. tokens: training tokens of each.
        length: tokens a sample is trained on (it reads one more, for the last target). seed: of the order.
    """

    languages: tuple[str, ...]
    quotas: tuple[int, ...]
    tokens: tuple[int, ...]
    length: int
    seed: int

    @property
    def windows(self) -> tuple[int, ...]:
        """Windows in one epoch of each language; a text shorter than one window is repeated to fill it."""
        return tuple(max(1, (count - 1) // self.length) for count in self.tokens)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (language index, first token, epoch) of each sample.

        Args:
            samples: indices, uint64, [n].

        Returns:
            int64 arrays [n]. A sample reads tokens [first, first + length] of its language's stream, cyclically.
        """
        samples = np.asarray(samples, dtype=_U64)
        blocks, slots = samples // _U64(BLOCK), (samples % _U64(BLOCK)).astype(np.int64)
        language = np.empty(len(samples), dtype=np.int64)
        occurrence = np.empty(len(samples), dtype=_U64)
        for block in np.unique(blocks):
            inside = blocks == block
            order, ranks = self._block(int(block))
            language[inside] = order[slots[inside]]
            occurrence[inside] = ranks[slots[inside]]
        start, epoch = np.empty(len(samples), dtype=np.int64), np.empty(len(samples), dtype=np.int64)
        for index, (quota, windows) in enumerate(zip(self.quotas, self.windows)):
            mine = language == index
            if mine.any():
                nth = blocks[mine] * _U64(quota) + occurrence[mine]
                start[mine], epoch[mine] = self._window(index, nth, windows)
        return language, start, epoch

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the language of each slot of a block, and how often it stood before in the block."""
        plain = np.repeat(np.arange(len(self.quotas)), self.quotas)
        ranks = np.concatenate([np.arange(quota, dtype=_U64) for quota in self.quotas])
        hashes = mix(np.arange(BLOCK, dtype=_U64) ^ _U64(_key("block", self.seed, block)))
        order = np.argsort(hashes, kind="stable")
        return plain[order], ranks[order]

    def _window(self, index: int, nth: np.ndarray, windows: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (first token, epoch) of the nth samples of a language."""
        epochs, within = nth // _U64(windows), nth % _U64(windows)
        name = self.languages[index]
        start = np.empty(len(nth), dtype=np.int64)
        spare = max(0, self.tokens[index] - 1 - windows * self.length)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            key = _key("epoch", self.seed, name, int(epoch))
            window = permute(within[inside], windows, np.full(int(inside.sum()), key, dtype=_U64))
            # The remainder is left out at another end each epoch, so that every token is seen.
            start[inside] = window.astype(np.int64) * self.length + key % (spare + 1)
        return start, epochs.astype(np.int64)

    def shares(self) -> dict[str, float]:
        """Return each language's share of the samples."""
        return {name: quota / BLOCK for name, quota in zip(self.languages, self.quotas)}

    def describe(self, total_tokens: int) -> str:
        """Return a line a language: share, and the epochs it means over `total_tokens`."""
        return "\n".join(
            f"  {name}: {share:.1%} of the samples, {share * total_tokens / count:.2f} epochs of its {count:,} tokens"
            for (name, share), count in zip(self.shares().items(), self.tokens)
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the mixture as JSON values."""
        return {
            "languages": list(self.languages),
            "quotas": list(self.quotas),
            "tokens": list(self.tokens),
            "length": self.length,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Mixture:
        """Return the mixture that `as_dict` wrote."""
        return cls(
            tuple(value["languages"]), tuple(value["quotas"]), tuple(value["tokens"]), value["length"], value["seed"]
        )


def plan_mixture(
    tokens: Mapping[str, int],
    length: int,
    seed: int,
    temperature: float = 0.5,
    weights: Mapping[str, float] | None = None,
    max_epochs: float | None = None,
    total_samples: int | None = None,
) -> Mixture:
    """Return the mixture for languages of the given sizes.

    Args:
        tokens: training tokens of each language, all above 0.
        temperature: a language with n tokens has the weight n ** temperature (Conneau et al. 2020, arXiv:1911.02116).
        weights: explicit shares instead; a language that is not named is left out.
        max_epochs: no language is repeated more often than this over `total_samples`; what it gives up goes to the
            others in proportion.

    Raises:
        UsageError: weights for a language that is not there, or none above 0.
        UserError: the cap leaves too little text for the run.
    """
    if weights:
        for name in weights:
            if name not in tokens:
                raise UsageError(f"--language-weights names {name!r}, which the shards do not hold{nearest(name, tokens)}")
        raw = {name: float(weights.get(name, 0.0)) for name in sorted(tokens)}
    else:
        raw = {name: float(tokens[name]) ** temperature for name in sorted(tokens)}
    raw = {name: weight for name, weight in raw.items() if weight > 0}
    if not raw:
        raise UsageError("--language-weights gives no language a share above 0")
    if max_epochs and total_samples:
        caps = {name: max_epochs * tokens[name] / (total_samples * length) for name in raw}
        raw = _capped(raw, caps)
    quotas = _apportion(raw)
    names = tuple(raw)
    return Mixture(names, tuple(quotas[name] for name in names), tuple(tokens[name] for name in names), length, seed)


def _capped(weights: dict[str, float], caps: dict[str, float]) -> dict[str, float]:
    """Return shares no larger than `caps`, the excess given to the others in proportion."""
    if sum(caps.values()) < 1:
        raise UserError(
            f"--max-epochs-per-language allows only {sum(caps.values()):.0%} of the run's samples; raise it, or lower "
            "--max-steps"
        )
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    fixed: dict[str, float] = {}
    while over := {name for name in shares if name not in fixed and shares[name] > caps[name] * (1 + 1e-12)}:
        fixed |= {name: caps[name] for name in over}
        rest = sum(weights[name] for name in shares if name not in fixed)
        left = 1 - sum(fixed.values())
        shares = {name: fixed.get(name, left * weights[name] / rest if rest else 0.0) for name in shares}
    return shares


def _apportion(weights: dict[str, float]) -> dict[str, int]:
    """Return whole samples a block, in proportion to `weights` by largest remainder, each at least 1."""
    if len(weights) > BLOCK:
        raise UserError(f"{len(weights)} languages are more than a block of {BLOCK} samples can hold")
    total, free = sum(weights.values()), BLOCK - len(weights)
    exact = {name: max(0.0, weight / total * BLOCK - 1) for name, weight in weights.items()}
    scale = free / sum(exact.values()) if sum(exact.values()) else 0.0
    exact = {name: value * scale for name, value in exact.items()}
    quotas = {name: 1 + int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name))
    for position in range(BLOCK - sum(quotas.values())):
        quotas[by_remainder[position % len(by_remainder)]] += 1
    return quotas
