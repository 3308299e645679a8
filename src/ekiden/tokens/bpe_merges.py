"""Exact ids of SentencePiece BPE models, faster: the same merges, compiled (`native/bpe.c`).

SentencePiece joins, of all neighbours that make a piece together, the two whose piece has the highest score, the leftmost
of equal ones. Scores are only compared, never added up, so their ranks do as well, and there is nothing to round.
What makes it faster: a piece's neighbours are two numbers, looked up in a table of all ways to make a piece of two; a
text is cut where no piece can span the cut (nothing merges across it), and the ids of the units between two cuts are kept.

Pieces that the user defined are taken out of the text first, the longest at every place, and merge with nothing.
`merged_pieces` names the models for which SentencePiece does more than that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ekiden.tokenizer.load import Tokenizer
from ekiden.tokens.compiled import CompiledEncoder, byte_ids, cuts_between, joined, unknown_id
from ekiden.tokens.exact import USER_DEFINED, NotProvable, merged_pieces

_KEPT_UNITS = 1 << 19
"""Of 64 bytes each."""


class BpeMerges(CompiledEncoder):
    """The ids of a BPE model's texts.

    Memory: 32 MB of known units, 6 MB of tables for 32,000 pieces, about 4 bytes an id of a batch; for text without a cut
    40 bytes a character of one text.

    Raises:
        NotProvable: it has pieces of odd kinds; see `CompiledEncoder`.
    """

    name = "BPE merges"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, "bpe")

    def _new(self, model: Any) -> int | None:
        """Make the trie of all strings that can stand in a text on the way, and the table of merges."""
        scores = np.array([piece.score for piece in model.pieces], dtype=np.float32)
        if np.isnan(scores).any():
            raise NotProvable("a score of its pieces is not a number")
        ranks = np.unique(-scores, return_inverse=True)[1].astype(np.int32)
        defined = np.array([piece.type == USER_DEFINED for piece in model.pieces])
        pieces = {text: number for number, text in merged_pieces(model).items()}
        # Sorted as their UTF-8 is: both go by code points.
        order = sorted(pieces.keys() | set("".join(pieces)))
        ids = np.array([pieces.get(text, -1) for text in order], dtype=np.int32)
        whole = ((ids >= 0) & defined[ids]).astype(np.uint8)
        strings = "\0".join(order).encode().split(b"\0")
        return self.library.bpe_new(
            *joined(strings), ids, ranks[ids], whole, len(order), unknown_id(model), byte_ids(model),
            cuts_between(strings), _KEPT_UNITS,
        )  # fmt: skip
