"""Exact ids of SentencePiece unigram models, faster: the same search in the same arithmetic, compiled (`native/unigram.c`).

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
from typing import Any

import numpy as np

from ekiden.tokenizer.load import Tokenizer
from ekiden.tokens.compiled import CompiledEncoder, byte_ids, cuts_between, joined, unknown_id
from ekiden.tokens.exact import ESCAPED, NORMAL, SPACE, USER_DEFINED, NotProvable

_UNKNOWN_PENALTY = 10.0
_LIMIT = 100_000.0
"""Sums beyond it are set back to 0."""

_VERSIONS = ("0.2.3",)
"""Earlier ones (0.2.0) compare in double and never set back."""

_KEPT_UNITS = 1 << 20
"""Of 64 bytes each. A unit is kept for every binade it was met in; half as many are a fifth slower."""


class UnigramSearch(CompiledEncoder):
    """The ids of a unigram model's texts.

    Memory: 64 MB of known units, the trie (1 MB for 16,000 pieces), about 4 bytes an id of a batch.

    Raises:
        NotProvable: the installed SentencePiece is another version than was looked at; see `CompiledEncoder`.
    """

    name = "unigram search"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, "unigram")
        version = importlib.metadata.version("sentencepiece")
        if version not in _VERSIONS:
            raise NotProvable(f"the sums of SentencePiece {version} are not known")

    def _new(self, model: Any) -> int | None:
        """Make the trie and the scores."""
        pieces, unknown_score = scored_pieces(model)
        order = sorted(pieces)
        ids = np.array([pieces[data][0] for data in order], dtype=np.int32)
        scores = np.array([pieces[data][1] for data in order], dtype=np.float32)
        return self.library.unigram_new(
            *joined(order), ids, scores, len(order), unknown_score, unknown_id(model), byte_ids(model),
            cuts_between(order), _LIMIT, _KEPT_UNITS,
        )  # fmt: skip


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
