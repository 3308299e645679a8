"""The order of the data: a pure function from a sample's index to a language and a place in its text.

`shares.plan_mixture` turns the languages' sizes into quotas once, at the start of a run; the `Mixture` is kept in
every checkpoint and decides everything after that. Position in the data is one integer: nothing to
fast-forward, nothing to save, the same on any number of machines, workers or microbatches.

A run may end on other shares than it began with (`later`): a new row of blocks begins at a fixed sample, and
every language's windows go on where they were.

Samples come in blocks of 4,096. Every block holds each language's exact quota, shuffled by (seed, block).
Inside a language, windows follow a permutation of their own in each epoch: a Feistel network with cycle
walking (Black & Rogaway 2002), O(1) in memory and time. Only integer arithmetic modulo 2^64 is used, none of
numpy's generators, whose streams may change between versions. **The order is frozen**: a change here would
change the data of every run that is being resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ekiden.errors import UserError

BLOCK = 4096
"""Samples in a block: a share is kept to 1/4096, and each language appears in every block."""

_U64 = np.uint64
_ROUNDS = 6
"""Even, so that both halves end where they began; 4 are the least that are strong (Luby & Rackoff 1988)."""


def mix(values: np.ndarray) -> np.ndarray:
    """Return a hash of each uint64, a bijection (the finalizer of splitmix64, Steele et al. 2014)."""
    z = values + _U64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
    return z ^ (z >> _U64(31))


def _key(*parts: str | int) -> np.uint64:
    """Return 64 bits that stand for `parts`, the same on every machine and in every version."""
    data = "\0".join(str(part) for part in parts).encode("utf-8", "surrogatepass")
    return _U64(int.from_bytes(hashlib.sha256(data).digest()[:8], "little"))


def permute(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return where the permutation of range(size) that a key names sends each value.

    The halves of the network are numbers below a = ceil(sqrt(size)) and b = ceil(size / a), not bits: a * b
    exceeds the size by less than a, so that hardly a value has to walk on, where powers of two mean up to 4
    passes on average.

    Args:
        values: uint64 [n], each below its size, and that at most 2^62.
        sizes: uint64 [n].
        keys: uint64 [n]; values of the same size and key are sent by the same permutation.

    Returns:
        uint64 [n].
    """
    result = values.copy()
    todo = np.arange(len(values))
    while len(todo):
        size, key = sizes[todo], keys[todo]
        result[todo] = moved = _feistel(result[todo], size, key)
        todo = todo[moved >= size]
    return result


def _feistel(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return a keyed permutation of range(a * b) applied to the values; `permute` explains a and b."""
    one = _U64(1)
    a = _ceil_sqrt(sizes)
    b = (sizes + a - one) // a
    left, right = values % a, values // a
    for number in range(_ROUNDS):
        modulus = a if number % 2 == 0 else b
        left, right = right, (left + mix(right ^ mix(keys + _U64(number))) % modulus) % modulus
    return left + a * right


def _ceil_sqrt(sizes: np.ndarray) -> np.ndarray:
    """Return the exact ceil(sqrt(size)): the floating root is right to 1 below 2^62, and is mended."""
    root = np.sqrt(sizes.astype(np.float64)).astype(_U64)
    root -= (root * root >= sizes).astype(_U64)
    root += (root * root < sizes).astype(_U64)
    return root + (root * root < sizes).astype(_U64)


@lru_cache(maxsize=16)
def _block_order(seed: int, quotas: tuple[int, ...], begin: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the language of each slot of a block, and how often it stood before in the block.

    Blocks are numbered from the sample `begin`, where their shares begin.

    Kept for the next call: steps are much smaller than a block, and sorting one takes 0.3 ms.
    """
    key = _key("block", seed, block) if begin == 0 else _key("block", seed, begin, block)
    order = np.argsort(mix(np.arange(BLOCK, dtype=_U64) ^ key), kind="stable")
    language = np.repeat(np.arange(len(quotas)), quotas)[order]
    rank = np.empty(BLOCK, dtype=_U64)
    rank[np.argsort(language, kind="stable")] = np.concatenate(
        [np.arange(quota, dtype=_U64) for quota in quotas]
    )
    return language, rank


@dataclass(frozen=True)
class Mixture:
    """The order of a run.

    Attributes:
        languages: names.
        quotas: samples of each language in a block of 4,096, at least 1.
        tokens: training tokens of each language.
        length: tokens a sample is trained on (it reads one more, for the last target).
        seed: of the order.
        later: (first sample, quotas) of the shares that hold from that sample on, in order.
    """

    languages: tuple[str, ...]
    quotas: tuple[int, ...]
    tokens: tuple[int, ...]
    length: int
    seed: int
    later: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def windows(self) -> tuple[int, ...]:
        """Windows in one epoch of each language; a text shorter than one window is repeated to fill it."""
        return tuple(max(1, (count - 1) // self.length) for count in self.tokens)

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per language, uint64: windows, positions the windows of an epoch can be shifted by, key."""
        windows = self.windows
        spare = [max(0, count - 1 - n * self.length) for count, n in zip(self.tokens, windows)]
        keys = [_key("language", self.seed, name) for name in self.languages]
        sizes, spares = (np.array(values, dtype=_U64) for values in (windows, spare))
        return sizes, spares, np.array(keys, dtype=_U64)

    @cached_property
    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per part of the run with shares of its own, uint64: first sample [p], quotas [p, languages], and the samples
        each language has had before it [p, languages]."""
        begins = [0, *(begin for begin, _quotas in self.later)]
        quotas = [self.quotas, *(quotas for _begin, quotas in self.later)]
        before = [np.zeros(len(self.languages), dtype=_U64)]
        for begin, end, shares in zip(begins, begins[1:], quotas):
            before.append(before[-1] + self._count(begin, end - begin, shares))
        return np.array(begins, dtype=_U64), np.array(quotas, dtype=_U64), np.array(before, dtype=_U64)

    def _count(self, begin: int, samples: int, quotas: tuple[int, ...]) -> np.ndarray:
        """Return how many of the first `samples` samples from `begin` on each language has: uint64 [languages]."""
        blocks, rest = divmod(samples, BLOCK)
        languages, _ranks = _block_order(self.seed, quotas, begin, blocks)
        part = np.bincount(languages[:rest], minlength=len(quotas)).astype(_U64)
        return _U64(blocks) * np.array(quotas, dtype=_U64) + part

    def samples_of(self, samples: int) -> dict[str, int]:
        """Return how many of a run's first `samples` samples each language has."""
        begins, quotas, before = self._parts
        part = int(np.searchsorted(begins, samples, side="right")) - 1
        begin = int(begins[part])
        counts = before[part] + self._count(begin, samples - begin, tuple(quotas[part].tolist()))
        return dict(zip(self.languages, counts.tolist()))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (language index, first token, epoch) of each sample.

        Sample s stands in block s // 4096 (counted anew where the shares change). The j-th sample of a language,
        over all blocks, reads window
        permutation(j % windows) of epoch j // windows. The windows of an epoch are shifted together by a part
        of what the text has beyond whole windows, another in each epoch, so that its tail is seen too. About
        4 microseconds a sample in steps of 64, whatever the index.

        Args:
            samples: indices from 0 to below 2^63, [n], in any order.

        Returns:
            int64 arrays [n]. A sample reads tokens [first, first + length] of its language's stream, a
            ring where that is shorter.
        """
        samples = np.asarray(samples, dtype=_U64)
        begins, part_quotas, before = self._parts
        part = np.searchsorted(begins, samples, side="right") - 1
        inside_part = samples - begins[part]
        block_of, slots = inside_part // _U64(BLOCK), (inside_part % _U64(BLOCK)).astype(np.int64)
        pairs = np.stack([part.astype(_U64), block_of])
        blocks, which = np.unique(pairs, axis=1, return_inverse=True)
        which = which.reshape(-1)
        language, rank = np.empty(len(samples), dtype=np.int64), np.empty(len(samples), dtype=_U64)
        groups = np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])
        for (number, block), inside in zip(blocks.T.tolist(), groups):
            languages_of_slots, ranks_of_slots = _block_order(
                self.seed, tuple(part_quotas[number].tolist()), int(begins[number]), block
            )
            language[inside], rank[inside] = languages_of_slots[slots[inside]], ranks_of_slots[slots[inside]]
        windows, spares, keys = (table[language] for table in self._tables)
        # Below 2^63: quotas are at most a block.
        nth = before[part, language] + block_of * part_quotas[part, language] + rank
        epoch, within = nth // windows, nth % windows
        key = mix(keys ^ mix(epoch))
        shift = mix(~key) % (spares + _U64(1))
        start = permute(within, windows, key) * _U64(self.length) + shift
        return language, start.astype(np.int64), epoch.astype(np.int64)

    def shares(self) -> dict[str, float]:
        """Return each language's share of the samples, as the run begins."""
        return {name: quota / BLOCK for name, quota in zip(self.languages, self.quotas)}

    def describe(self, total_tokens: int) -> str:
        """Return a line a language: share (at the beginning, and at the end where it is another), and the epochs it
        means over `total_tokens`."""
        counts = self.samples_of(total_tokens // self.length)
        last = self.later[-1][1] if self.later else self.quotas
        lines = []
        for index, (name, share) in enumerate(self.shares().items()):
            end = f", {last[index] / BLOCK:.1%} at the end" if last[index] != self.quotas[index] else ""
            epochs = counts[name] * self.length / self.tokens[index]
            lines.append(
                f"  {name}: {share:.1%} of the samples{end}, {epochs:.2f} epochs of its "
                f"{self.tokens[index]:,} tokens"
            )
        return "\n".join(lines)

    def ending_with(self, shares: Mapping[str, float], first_sample: int) -> Mixture:
        """Return this order up to `first_sample`, and after it one with other shares of the same languages; those
        that `shares` does not name are read no more."""
        earlier = tuple(part for part in self.later if part[0] < first_sample)
        quotas = apportion({name: shares[name] for name in self.languages if name in shares})
        last = tuple(quotas.get(name, 0) for name in self.languages)
        if first_sample == 0:
            sizes = dict(zip(self.languages, self.tokens))
            kept = tuple(sizes[name] for name in quotas)
            return Mixture(tuple(quotas), tuple(quotas.values()), kept, self.length, self.seed)
        return replace(self, later=(*earlier, (first_sample, last)))

    def as_dict(self) -> dict[str, Any]:
        """Return the mixture as JSON values, for the checkpoint."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Mixture:
        """Return the mixture that `as_dict` wrote.

        Raises:
            UserError: it is not one, whole and consistent: a run's order is never guessed.
        """
        names = [field.name for field in fields(cls)]
        try:
            if set(value) | {"later"} != set(names):
                raise ValueError(f"it has {sorted(value)}, expected {names}")
            values: dict[str, Any] = {name: _tuples(item) for name, item in value.items()}
            mixture = cls(**values)
            mixture._check()
        except (ValueError, TypeError) as error:
            raise UserError(
                f"the checkpoint's data order is damaged ({error}); resume from another checkpoint"
            ) from None
        return mixture

    def _check(self) -> None:
        """Raise ValueError where the attributes do not make an order."""
        integers = {"quotas": self.quotas, "tokens": self.tokens, "length, seed": (self.length, self.seed)}
        for name, values in integers.items():
            if not all(type(number) is int for number in values):
                raise ValueError(f"{name} {values!r} are not whole numbers")
        if not all(isinstance(name, str) for name in self.languages) or not self.languages:
            raise ValueError(f"languages {self.languages!r} are not names")
        if not len(set(self.languages)) == len(self.languages) == len(self.quotas) == len(self.tokens):
            raise ValueError("languages, quotas and tokens do not belong together")
        if sum(self.quotas) != BLOCK or min(self.quotas) < 1:
            raise ValueError(f"quotas {self.quotas} do not make a block of {BLOCK}")
        if min(self.tokens) < 1 or self.length < 1:
            raise ValueError("tokens and length must be at least 1")
        before = 0
        for begin, quotas in self.later:
            if type(begin) is not int or begin <= before or not all(type(q) is int for q in quotas):
                raise ValueError(f"later shares {self.later!r} do not begin one after the other")
            if len(quotas) != len(self.languages) or sum(quotas) != BLOCK or min(quotas) < 0:
                raise ValueError(f"quotas {quotas} do not make a block of {BLOCK}")
            before = begin


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def apportion(weights: dict[str, float]) -> dict[str, int]:
    """Return whole samples a block, in proportion to `weights` by largest remainder, each at least 1."""
    total, free = sum(weights.values()), BLOCK - len(weights)
    # The first sample of each is set; the rest follows what its share is above that.
    exact = {name: max(0.0, weight / total * BLOCK - 1) for name, weight in weights.items()}
    scale = free / sum(exact.values()) if free else 0.0
    exact = {name: value * scale for name, value in exact.items()}
    quotas = {name: 1 + int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name))
    for name in by_remainder[: BLOCK - sum(quotas.values())]:
        quotas[name] += 1
    assert sum(quotas.values()) == BLOCK
    return quotas
