"""What gives the ids of a SentencePiece model faster than SentencePiece, and how it is made sure that they are the same.

Three such encoders: `unigram_search`, `bpe_merges`, and `bpe_cache` where there is no compiler. `tokens.build` asks
`refusal` first, which compares ids on nasty strings and on texts of the corpus; a worker puts the encoder before its
tokenizer and compares the beginning of every unit again (`check`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from ekiden.tokenizer.load import SENTENCEPIECE_FILE, SentencePieceTokenizer, Tokenizer

SPACE, ESCAPED = " ", "\u2581"
NORMAL, UNKNOWN, USER_DEFINED, UNUSED, BYTE = 1, 2, 4, 5, 6
"""Types of pieces, as numbered in `sentencepiece_model.proto`."""


class NotProvable(Exception):
    """It is not known that the ids of this model are those of SentencePiece; the message says why."""


class Differs(Exception):
    """Other ids than SentencePiece's, which has not happened yet; the message says for which text."""


class Encoder(Protocol):
    """Gives ids as `SentencePieceTokenizer.encode_batch` does; `name` is for messages."""

    name: str

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32."""


NASTY = [
    "",
    " ",
    "a",
    "  two  spaces \n\t\r\n tabs\u00a0and\u3000others ",
    "\u2581literal \u2581\u2581 marks",
    "<s> </s> <unk> <pad> <0x41>",
    "e\u0301\u0323 \u0915\u094d\u200d\u0937 \u0930\u093c \ufb01 \u2460 \u00bd \uff21 \u212b",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U00020000\U0010fffd\u0000\u0001\x7f\ufeff\ufffd",
    "a" * 200 + " " * 70 + "\u0915" * 100 + "0123456789" * 20,
]
"""Compared at every start, beside the corpus: what a text can hold that a corpus's beginning need not show."""


def model_of(tokenizer: SentencePieceTokenizer) -> Any:
    """Return the model's ModelProto.

    Raises:
        NotProvable: its spaces are not escaped.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto()
    model.ParseFromString(tokenizer.files[SENTENCEPIECE_FILE])
    if not model.normalizer_spec.escape_whitespaces:
        raise NotProvable("its spaces are not escaped")
    return model


def merged_pieces(model: Any) -> dict[int, str]:
    """Return the pieces by id that a BPE model's merges can make or are kept from making; spaces for U+2581.

    Raises:
        NotProvable: what SentencePiece does with some of its pieces is not done here. An unused one is taken apart by the
            merge of its kind that was looked at last, wherever in the text; a control piece of one character, or of a
            normal piece's text, is taken for that.
    """
    kinds, texts = [piece.type for piece in model.pieces], [piece.piece for piece in model.pieces]
    # At once: one by one takes a tenth of a second for 32,000.
    escaped = "\0".join(texts).replace(ESCAPED, SPACE).split("\0")
    if len(escaped) != len(texts):
        raise NotProvable("a piece of it holds a NUL")
    merged = {}
    for number, (kind, text, found) in enumerate(zip(kinds, texts, escaped)):
        if kind in (NORMAL, USER_DEFINED) and SPACE not in text:  # it never stands in a normalised text
            merged[number] = found
    if UNUSED in kinds:
        raise NotProvable(f"its piece {texts[kinds.index(UNUSED)]!r} is marked unused")
    known = set(merged.values())
    for number, text in enumerate(escaped):
        if kinds[number] not in (NORMAL, USER_DEFINED) and (len(text) == 1 or text in known):
            raise NotProvable(f"its control piece {texts[number]!r} may stand in a text")
    return merged


class Normalizer:
    """Texts as a model's search sees them, one after the other in bytes, a space for U+2581.

    SentencePiece's own `normalize` makes them; for models that keep text as it is, escaping spaces is the whole of it.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer, spec: Any) -> None:
        changes = spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces
        self._normalize = tokenizer.processor.normalize if changes else None

    def __call__(self, texts: list[str]) -> tuple[bytes, np.ndarray]:
        """Return (the bytes of all texts, where each begins and the last ends: int64 [texts + 1])."""
        if self._normalize is not None and texts:
            texts = self._normalize(texts)
        # A literal U+2581 is a space to SentencePiece.
        datas = [(text.replace(ESCAPED, SPACE) if ESCAPED in text else text).encode() for text in texts]
        return b"".join(datas), np.cumsum([0, *map(len, datas)], dtype=np.int64)


def separable(pieces: Iterable[bytes]) -> np.ndarray:
    """Return whether bytes a and b stand side by side in none of the pieces, nor in a character: bool [256, 256]."""
    allowed = np.ones((256, 256), dtype=bool)
    allowed[:, 0x80:0xC0] = False  # not within a character
    encoded = [data for data in pieces if data]
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    within = np.ones(len(joined), dtype=bool)
    within[np.cumsum([len(data) for data in encoded]) - 1] = False
    within = np.flatnonzero(within)
    allowed[joined[within], joined[within + 1]] = False
    return allowed


def differing_text(encoder: Encoder, tokenizer: Tokenizer, texts: list[str]) -> str | None:
    """Return the first text whose ids differ, None where all are the same."""
    pairs = zip(texts, encoder.encode_batch(texts), tokenizer.encode_batch(texts))
    return next((text for text, mine, theirs in pairs if not np.array_equal(mine, theirs)), None)


def check(encoder: Encoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Compare the ids of some texts.

    Raises:
        Differs: they are not the same.
    """
    text = differing_text(encoder, tokenizer, texts)
    if text is not None:
        raise Differs(repr(text[:60]))
