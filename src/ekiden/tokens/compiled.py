"""What the two compiled encoders (`unigram_search`, `bpe_merges`) have in common: a model goes in as arrays once, texts go in
as bytes, ids come out as one array.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from ekiden.tokenizer.load import SentencePieceTokenizer, Tokenizer
from ekiden.tokens import kernel
from ekiden.tokens.exact import BYTE, UNKNOWN, Normalizer, NotProvable, model_of, separable

MIX = np.array([(0x9E3779B97F4A7C15 + 0x7A2C6B5E4D3F1E08 * i) % 2**64 for i in range(8)], dtype=np.uint64)
"""Odd multipliers of the hash. A poor one would cost time, never an id: keys are compared whole."""

_IDS_A_BYTE = 3
"""Most ids that a byte of text gives: an unknown space is the three bytes of U+2581."""

_SPARE = 64
"""Bytes behind the texts that `native` may read, and so many ids behind theirs that it may write."""


class CompiledEncoder:
    """The ids of a model's texts, as `SentencePieceTokenizer.encode_batch` gives them. For one thread at a time.

    Raises:
        NotProvable: it is no SentencePiece model of this type, or one whose spaces are not escaped, or there is no compiler.
    """

    name: str

    def __init__(self, tokenizer: Tokenizer, model_type: str) -> None:
        if not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.model_type != model_type:
            raise NotProvable(f"it is no SentencePiece {model_type} model")
        library = kernel.library()
        if library is None:
            raise NotProvable("there is no C compiler")
        self.library = library
        model = model_of(tokenizer)
        self._normalize = Normalizer(tokenizer, model.normalizer_spec)
        self._encode = getattr(library, f"{model_type}_encode")
        self._model = self._new(model)
        if not self._model:
            raise MemoryError
        weakref.finalize(self, getattr(library, f"{model_type}_free"), self._model)

    def _new(self, model: Any) -> int | None:
        """Return the address of the compiled model, None where memory ended; freed with this object."""
        raise NotImplementedError

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32."""
        data, borders = self._normalize(texts)
        data += bytes(_SPARE)
        ids = np.empty(_IDS_A_BYTE * len(data), dtype=np.int32)
        ends = np.zeros(len(texts) + 1, dtype=np.int64)
        total = self._encode(self._model, data, borders, len(texts), MIX, ids, ends[1:])
        if total < 0:
            raise MemoryError
        ids = ids[:total].copy()
        bounds = ends.tolist()
        return [ids[begin:end] for begin, end in zip(bounds, bounds[1:])]


def joined(strings: list[bytes]) -> tuple[bytes, np.ndarray]:
    """Return (all strings one after the other, where each ends: int64)."""
    return b"".join(strings), np.cumsum([len(data) for data in strings], dtype=np.int64)


def cuts_between(pieces: list[bytes]) -> np.ndarray:
    """Return bit a << 8 | b: bytes a and b stand side by side in no piece; uint8 [8192]."""
    return np.packbits(separable(pieces), axis=1, bitorder="little").reshape(-1)


def unknown_id(model: Any) -> int:
    """Return the id of the unknown piece, which every model has."""
    return next(number for number, piece in enumerate(model.pieces) if piece.type == UNKNOWN)


def byte_ids(model: Any) -> np.ndarray:
    """Return the ids of the 256 byte pieces, int32; -1 where unknown characters do not become bytes."""
    ids = np.full(256, -1, dtype=np.int32)
    if model.trainer_spec.byte_fallback:
        for number, piece in enumerate(model.pieces):
            if piece.type == BYTE:
                ids[int(piece.piece[3:-1], 16)] = number
    return ids
