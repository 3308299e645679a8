"""Exact ids of SentencePiece BPE models, several times faster, where there is no compiler (with one: `bpe_merges`).

A text is cut where no piece can span the cut, and the ids of every unit between two cuts are kept.

Why it is exact. BPE merges two neighbours only into a piece of the vocabulary. Where the two bytes at a border stand
side by side in no piece, nothing is ever merged across it, so the ids of both sides are independent of each other
and the ids of the whole are theirs one after the other. That holds for the normalised text, which therefore is what
gets cut: SentencePiece's own `normalize` makes it (escaping spaces is the whole of it for models that keep text as it
is), and the units are encoded by the same model with normalisation switched off. Unigram models have no such borders:
their float32 sums run over the whole document and decide its ties (`unigram_search`).

`exact` says how it is compared with SentencePiece.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from ekiden.tokenizer.load import SentencePieceTokenizer, Tokenizer, encode_texts
from ekiden.tokens.exact import (
    SPACE,
    Normalizer,
    NotProvable,
    merged_pieces,
    model_of,
    separable,
)

_SLOTS = {1: 1 << 18, 2: 1 << 18, 4: 1 << 18, 8: 1 << 16}
"""Slots of the tables, by words of 8 bytes: for units up to 7, 15, 31 and 63 bytes. Longer ones are encoded each time.
A table of one word, which most units fit in, makes known text a third faster."""

_CLASSES = 8
_PROBES = 8
_POOL_IDS = 2 << 20
_JOINED_BYTES = 512
_COUNT_BITS = 24
_PADDING = bytes(8 * max(_SLOTS))
_MIX = [np.uint64((0x9E3779B97F4A7C15 + 0x7A2C6B5E4D3F1E08 * i) % 2**64) for i in range(max(_SLOTS))]
"""Odd multipliers. A poor hash would cost time, never an id: keys are compared whole."""


class BpeCache:
    """The ids of a BPE model's texts, as `SentencePieceTokenizer.encode_batch` gives them.

    Memory: about 50 MB when full, whatever the text; then all units are forgotten and learnt again. Threads take turns.

    Raises:
        NotProvable: it is no BPE model, or one whose spaces are not escaped, or with pieces of odd kinds.
    """

    name = "BPE cache"

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.model_type != "bpe":
            raise NotProvable("it is no SentencePiece BPE model")
        import sentencepiece

        model = model_of(tokenizer)
        spec = model.normalizer_spec
        self._normalize = Normalizer(tokenizer, spec)
        pieces = list(merged_pieces(model).values())
        self._left, self._right = border_masks(pieces)
        spec.precompiled_charsmap = b""
        spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self._unknown = None if model.trainer_spec.byte_fallback else self._inner.unk_id()
        self._separator = separator_of(pieces, self._inner)
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._tables = [_Table(words, slots) for words, slots in _SLOTS.items()]
        self._pool = np.empty(_POOL_IDS, dtype=np.int32)
        self._used = 0

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32."""
        data, borders = self._normalize(texts)
        if not data:
            return [np.empty(0, dtype=np.int32) for _ in texts]
        starts = self._unit_starts(data, borders)
        with self._lock:
            ids, token_ends = self._encode(data, starts)
        ends = token_ends[np.searchsorted(starts, borders)].tolist()
        found = [ids[begin:end] for begin, end in itertools.pairwise(ends)]
        if self._unknown is None:
            return found
        # SentencePiece makes neighbouring unknown characters one id, also across a cut.
        return [_without_repeats(part, self._unknown) for part in found]

    def _unit_starts(self, data: bytes, borders: np.ndarray) -> np.ndarray:
        """Return where the units begin: at the borders of the texts and wherever no piece spans two bytes."""
        left = np.frombuffer(data.translate(self._left), dtype=np.uint8)
        right = np.frombuffer(data.translate(self._right), dtype=np.uint8)
        begins = np.empty(len(data), dtype=bool)
        np.not_equal(left[:-1] & right[1:], 0, out=begins[1:])
        begins[borders[borders < len(data)]] = True
        return np.flatnonzero(begins)

    def _encode(self, data: bytes, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids of all units, ids before each unit and at the end)."""
        if self._used > _POOL_IDS // 2 or any(table.crowded for table in self._tables):
            self._forget()
        lengths = np.diff(starts, append=len(data))
        padded = np.frombuffer(data + _PADDING, dtype=np.uint8)
        words_at: np.ndarray = np.ndarray(
            (len(padded) - 7,), dtype="<u8", buffer=padded, strides=(1,)
        )  # one at every byte
        places = np.full(len(starts), -1, dtype=np.int64)
        below = 0
        for table in self._tables:
            mine = np.flatnonzero((lengths < table.limit) & (lengths >= below))
            below = table.limit
            if not len(mine):
                continue
            keys, hashes = table.keys_of(words_at, starts[mine], lengths[mine])
            found = table.find(keys, hashes)
            places[mine] = found
            missing = np.flatnonzero(found < 0)
            if len(missing):
                units = mine[missing]
                new, first, which, same = _distinct(keys[:, missing], hashes[missing])
                learnt = self._learn(data, starts[units[first]], lengths[units[first]])
                table.insert(new, hashes[missing[first]], learnt)
                places[units[same]] = learnt[which[same]]
        rest = np.flatnonzero(places < 0)
        if len(rest):
            places[rest] = self._learn(data, starts[rest], lengths[rest])
        counts = places & ((1 << _COUNT_BITS) - 1)
        ends = np.cumsum(counts)
        index = np.repeat((places >> _COUNT_BITS) - (ends - counts), counts)
        index += np.arange(len(index))
        return self._pool[index], np.concatenate([[0], ends])

    def _learn(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Encode units and return where their ids stand in the pool: offset << _COUNT_BITS | count."""
        units = [data[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist())]
        ids, ends = self._encode_units(units)
        if self._used + len(ids) > len(self._pool):
            self._pool = np.concatenate([self._pool[: self._used], np.empty(len(ids) + _POOL_IDS, np.int32)])
        self._pool[self._used : self._used + len(ids)] = ids
        begins = np.concatenate([[0], ends[:-1, 1]])
        places = ((self._used + begins) << _COUNT_BITS) | (ends[:, 0] - begins)
        self._used += len(ids)
        return places

    def _encode_units(self, units: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, rows of (end of the unit's ids, beginning of the next one's)).

        Units are joined with a separator, which merges with nothing: a call a unit takes 5 times as long.
        """
        if self._separator is not None:
            character, number = self._separator
            parts = encode_texts(self._inner, _joined(units, character))
            ids = np.concatenate(parts)
            at = np.flatnonzero(ids == number)
            if len(at) == len(units):
                return ids, np.stack([at, at + 1], axis=1)
        # No separator, or the text itself holds it.
        parts = encode_texts(self._inner, [unit.decode() for unit in units])
        at = np.cumsum([len(part) for part in parts])
        return np.concatenate(parts), np.stack([at, at], axis=1)


class _Table:
    """Where the ids of known units stand: open addressing, keys of whole words with the length in the last byte."""

    def __init__(self, words: int, slots: int) -> None:
        self.limit = 8 * words
        self._keys = np.zeros((words, slots), dtype=np.uint64)
        self._places = np.full(slots, -1, dtype=np.int64)
        self._shift = np.uint64(64 - slots.bit_length() + 1)
        self._entries, self._slots = 0, slots
        lengths = np.arange(self.limit)
        self._masks = np.stack([_low_bytes(np.clip(lengths - 8 * i, 0, 8)) for i in range(words)])
        self._lengths = lengths.astype(np.uint64) << np.uint64(56)

    @property
    def crowded(self) -> bool:
        """Whether it should be emptied."""
        return 2 * self._entries > self._slots

    def keys_of(
        self, words_at: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (keys [words, units], hashes [units]) of units."""
        keys = np.empty((len(self._keys), len(starts)), dtype=np.uint64)
        hashes = np.zeros(len(starts), dtype=np.uint64)
        for i, key in enumerate(keys):
            np.bitwise_and(words_at[starts + 8 * i], self._masks[i][lengths], out=key)
            if i == len(keys) - 1:
                key |= self._lengths[lengths]
            hashes += key * _MIX[i]
        hashes ^= hashes >> np.uint64(32)
        hashes *= _MIX[0]
        return keys, hashes

    def find(self, keys: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """Return the places of units, -1 where one is not known."""
        slots = (hashes >> self._shift).view(np.int64)
        found, same = self._look(keys, slots)
        # Not here, but the slot is taken: it may stand in one of the next.
        pending = np.flatnonzero(~same & (found >= 0))
        found[~same] = -1
        for probe in range(1, _PROBES):
            if not len(pending):
                break
            places, same = self._look(keys[:, pending], (slots[pending] + probe) & (self._slots - 1))
            found[pending[same]] = places[same]
            pending = pending[~same & (places >= 0)]
        return found

    def _look(self, keys: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        same = self._keys[0][slots] == keys[0]
        for mine, asked in zip(self._keys[1:], keys[1:]):
            same &= mine[slots] == asked
        return self._places[slots], same

    def insert(self, keys: np.ndarray, hashes: np.ndarray, places: np.ndarray) -> None:
        """Add distinct units that are not there; one that finds no slot near its own is left out."""
        slots = (hashes >> self._shift).view(np.int64)
        pending = np.arange(len(slots))
        for probe in range(_PROBES):
            wanted = (slots[pending] + probe) & (self._slots - 1)
            free = np.flatnonzero(self._places[wanted] < 0)
            taken, winner = np.unique(wanted[free], return_index=True)
            chosen = free[winner]
            self._keys[:, taken] = keys[:, pending[chosen]]
            self._places[taken] = places[pending[chosen]]
            self._entries += len(taken)
            pending = np.delete(pending, chosen)
            if not len(pending):
                return


def _distinct(keys: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (distinct keys, where each stands first, which of them each key is, whether it is really that one).

    Two keys of one hash are not taken for each other: the second is `not really` the first.
    """
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    distinct = keys[:, first]
    return distinct, first, which, (distinct[:, which] == keys).all(axis=0)


def _low_bytes(count: np.ndarray) -> np.ndarray:
    """Return masks of that many low bytes, 0 to 8."""
    table = [(1 << 8 * i) - 1 for i in range(9)]
    return np.array(table, dtype=np.uint64)[count]


def _joined(units: list[bytes], separator: str) -> list[str]:
    """Return units in strings of about _JOINED_BYTES, a separator after each unit."""
    strings, group, size = [], [], 0
    mark = separator.encode()
    for unit in units:
        group.append(unit)
        size += len(unit)
        if size >= _JOINED_BYTES:
            strings.append(b"".join([mark.join(group), mark]).decode())
            group, size = [], 0
    if group:
        strings.append(b"".join([mark.join(group), mark]).decode())
    return strings


def _without_repeats(ids: np.ndarray, number: int) -> np.ndarray:
    repeated = (ids[1:] == number) & (ids[:-1] == number)
    return ids[np.concatenate([[True], ~repeated])] if repeated.any() else ids


def border_masks(pieces: list[str]) -> tuple[bytes, bytes]:
    """Return two tables by byte: a text may be cut between bytes a and b where left[a] & right[b] is not 0.

    Exactly known is which of 65,536 pairs stand in no piece; the 256 rows are made 8 classes, so that two table
    look-ups of a byte each find the cuts of a text (4 ns a byte instead of 9). Rows are joined by what both allow,
    those first that lose the fewest cuts; measured loss: 1 to 4 % of the cuts.
    """
    allowed = separable(map(str.encode, pieces))
    last, first = np.full(256, 1e-9), np.full(256, 1e-9)  # how often a byte ends or begins a piece, about
    encoded = [data for data in map(str.encode, pieces) if data]
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    ends = np.cumsum([len(data) for data in encoded])
    share = 1 / np.arange(1, len(encoded) + 1)
    np.add.at(last, joined[ends - 1], share)
    np.add.at(first, joined[np.concatenate([[0], ends[:-1]])], share)
    unique, member = np.unique(allowed, axis=0, return_inverse=True)
    rows = unique.astype(np.float32)
    weights = np.bincount(member, weights=last, minlength=len(rows)).astype(np.float32)
    weighed = rows * first.astype(np.float32)
    # loss[i, j]: cuts that row i loses when only what row j allows, too, is allowed.
    loss = weights[:, None] * (weighed.sum(1)[:, None] - weighed @ rows.T)
    alive = list(range(len(rows)))
    while len(alive) > _CLASSES:
        both = (loss + loss.T)[np.ix_(alive, alive)]
        np.fill_diagonal(both, np.inf)
        one, other = sorted(divmod(int(both.argmin()), len(alive)))
        i, j = alive[one], alive.pop(other)
        rows[i] *= rows[j]
        weighed[i] *= rows[j]
        weights[i] += weights[j]
        member[member == j] = i
        loss[i] = weights[i] * (weighed[i].sum() - rows @ weighed[i])
        loss[:, i] = weights * (weighed.sum(1) - weighed @ rows[i])
    left = bytes(1 << alive.index(row) for row in member.tolist())
    right = bytes(sum(1 << bit for bit, row in enumerate(alive) if rows[row, byte]) for byte in range(256))
    return left, right


def separator_of(pieces: list[str], processor: Any) -> tuple[str, int] | None:
    """Return (a character that merges with nothing, its id), rare ones first; None where there is none."""
    inside = set("".join(piece for piece in pieces if len(piece) > 1))
    alone: Iterable[str] = reversed([piece for piece in pieces if len(piece) == 1 and piece != SPACE])
    for character in itertools.chain(map(chr, range(1, 32)), alone):
        if character not in inside:
            ids = processor.encode(character)
            if len(ids) == 1 and ids[0] != processor.unk_id():
                return character, ids[0]
    return None
