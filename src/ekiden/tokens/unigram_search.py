"""Exact ids of SentencePiece unigram models, faster: the same search in the same arithmetic, compiled (`kernel.c`).

SentencePiece keeps the best path to every place of the text, its score a sum in fp32, which it sets back to 0 beyond
100,000. In long texts these roundings decide between segmentations of almost the same score, so the same sums must be
made in the same order; a cache of words would give other ids for 5 documents of 1,000.

Two things make it faster. At a place that no piece spans all paths meet: what is before is decided, so that little memory
is looked at. And what a unit between two such places becomes is kept, together with the binade (the power of two) of
the sum before it: within a binade fp32 numbers have equal distances, so another sum shifts all of the unit's sums by the
same amount, and no comparison changes. Not where a sum leaves the binade, passes the 100,000, or lies half-way between
two numbers (rounded to the even one: kept for even and odd sums apart).

That these are SentencePiece's sums is known for the versions in _VERSIONS, from their source; for others SentencePiece
itself is asked. The ids must agree on nasty strings, on texts of the corpus and on the beginning of every unit even so.
"""

from __future__ import annotations

import importlib.metadata
import weakref
from typing import Any

import numpy as np

from ekiden.tokenizer.load import SentencePieceTokenizer, Tokenizer
from ekiden.tokens import kernel
from ekiden.tokens.exact import (
    BYTE,
    ESCAPED,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Normalizer,
    NotProvable,
    model_of,
    separable,
)

_UNKNOWN_PENALTY = 10.0
MIX = np.array([(0x9E3779B97F4A7C15 + 0x7A2C6B5E4D3F1E08 * i) % 2**64 for i in range(8)], dtype=np.uint64)

_LIMIT = 100_000.0
"""Sums beyond it are set back to 0."""

_VERSIONS = ("0.2.3",)
"""Earlier ones (0.2.0) compare in double and never set back."""

_KEPT_UNITS = 1 << 19
"""Of 64 bytes each."""

_IDS_A_BYTE = 3
"""Most ids that a byte of text gives: an unknown space is the three bytes of U+2581."""


class UnigramSearch:
    """The ids of a unigram model's texts, as `SentencePieceTokenizer.encode_batch` gives them.

    Memory: 32 MB of known units, the trie (1 MB for 16,000 pieces), about 4 bytes an id of a batch. For one thread at a time.

    Raises:
        NotProvable: it is no unigram model, one whose spaces are not escaped, or there is no compiler, or the
            installed SentencePiece is another version than was looked at.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.model_type != "unigram":
            raise NotProvable("it is no SentencePiece unigram model")
        library = kernel.library()
        if library is None:
            raise NotProvable("there is no C compiler")
        self._library = library
        version = importlib.metadata.version("sentencepiece")
        if version not in _VERSIONS:
            raise NotProvable(f"the sums of SentencePiece {version} are not known")
        model = model_of(tokenizer)
        self._normalize = Normalizer(tokenizer, model.normalizer_spec)
        self._compile(model)

    def _compile(self, model: Any) -> None:
        """Make the trie and the scores; freed with this object."""
        pieces, unknown_score = scored_pieces(model)
        order = sorted(pieces)
        ends = np.cumsum([len(data) for data in order], dtype=np.int64)
        ids = np.array([pieces[data][0] for data in order], dtype=np.int32)
        scores = np.array([pieces[data][1] for data in order], dtype=np.float32)
        unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
        cuts = np.packbits(separable(map(bytes.decode, order)), axis=1, bitorder="little").reshape(-1)
        self._model = self._library.unigram_new(
            b"".join(order), ends, ids, scores, len(order), unknown_score, unknown, byte_ids(model), cuts,
            _LIMIT, _KEPT_UNITS,
        )  # fmt: skip
        if not self._model:
            raise MemoryError
        weakref.finalize(self, self._library.unigram_free, self._model)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32."""
        data, borders = self._normalize(texts)
        data += bytes(64)  # which `kernel.c` may read
        ids = np.empty(_IDS_A_BYTE * len(data) + 1, dtype=np.int32)
        ends = np.zeros(len(texts) + 1, dtype=np.int64)
        total = self._library.unigram_encode(self._model, data, borders, len(texts), MIX, ids, ends[1:])
        if total < 0:
            raise MemoryError
        ids = ids[:total].copy()
        bounds = ends.tolist()
        return [ids[begin:end] for begin, end in zip(bounds, bounds[1:])]


def scored_pieces(model: Any) -> tuple[dict[bytes, tuple[int, float]], float]:
    """Return ((id, score) of each piece that text can become, by its bytes; the score of an unknown character).

    The scores are those of `unigram_model.cc`: a normal piece's own; a user-defined one's by its length in bytes.
    """
    scores = [piece.score for piece in model.pieces if piece.type == NORMAL]
    worst = np.float32(min([*scores, float(np.finfo(np.float32).max)]))
    pieces = {}
    for number, piece in enumerate(model.pieces):
        # A space never stands in a normalised text.
        if piece.type not in (NORMAL, USER_DEFINED) or SPACE in piece.piece:
            continue
        score, length = piece.score, len(piece.piece.encode())
        if piece.type == USER_DEFINED:
            score = 0.1 * (length - 1)
        pieces[piece.piece.replace(ESCAPED, SPACE).encode()] = (number, score)
    return pieces, float(worst - np.float32(_UNKNOWN_PENALTY))


def byte_ids(model: Any) -> np.ndarray:
    """Return the ids of the 256 byte pieces, int32; -1 where unknown characters do not become bytes."""
    ids = np.full(256, -1, dtype=np.int32)
    if model.trainer_spec.byte_fallback:
        for number, piece in enumerate(model.pieces):
            if piece.type == BYTE:
                ids[int(piece.piece[3:-1], 16)] = number
    return ids
