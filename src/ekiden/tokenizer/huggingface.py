"""A SentencePiece model as a Hugging Face tokenizer, for everyone who loads the finished model with transformers.

Exports write `tokenizer.json` and `tokenizer_config.json`. The class named there is the generic fast one: with a
model family's own class, or none, AutoTokenizer rebuilds the pipeline its own way and gives wrong ids.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ekiden.tokenizer.load import SENTENCEPIECE_FILE, SentencePieceTokenizer, Tokenizer

SPACE = "\u2581"


def huggingface_files(tokenizer: Tokenizer, max_length: int | None = None) -> dict[str, bytes]:
    """Return the files that AutoTokenizer loads, and the tokenizer's own, by name.

    Args:
        max_length: context length of the model, in tokens.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return dict(tokenizer.files)
    special = {
        name: tokenizer.processor.id_to_piece(number)
        for name, number in (
            ("bos_token", tokenizer.bos_id),
            ("eos_token", tokenizer.eos_id),
            ("pad_token", tokenizer.pad_id),
            ("unk_token", tokenizer.unk_id),
        )
        if number is not None
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # "</s>" standing in a text is text, for SentencePiece and so for the model.
        "split_special_tokens": True,
        **special,
        **({"model_max_length": max_length} if max_length else {}),
    }
    return {
        SENTENCEPIECE_FILE: tokenizer.files[SENTENCEPIECE_FILE],
        "tokenizer.json": json.dumps(pipeline(tokenizer), ensure_ascii=False).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=1, ensure_ascii=False) + "\n").encode(),
    }


def save_huggingface_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int | None = None) -> None:
    """Write `huggingface_files` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in huggingface_files(tokenizer, max_length).items():
        (folder / name).write_bytes(data)


def pipeline(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Return the `tokenizer.json` that does what the SentencePiece model does.

    SentencePiece normalises, puts U+2581 for each space, and segments the whole text at once: no pre-tokenizer.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # its classes are made at run time
    model = proto.ModelProto()
    model.ParseFromString(tokenizer.files[SENTENCEPIECE_FILE])
    normal, prefix = model.normalizer_spec, model.normalizer_spec.add_dummy_prefix
    steps: list[dict[str, Any]] = []
    if normal.precompiled_charsmap:
        import base64

        charsmap = base64.b64encode(normal.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if normal.remove_extra_whitespaces:
        steps += [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    if prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model),
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": _cut_controls(model) if tokenizer.model_type == "unigram" else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(model) if tokenizer.model_type == "bpe" else _unigram(model),
    }


def _added_tokens(model: Any) -> list[dict[str, Any]]:
    """Return the control pieces (as special) and the user-defined ones, which match before segmentation."""
    kinds = {2: True, 3: True, 4: False}  # UNKNOWN and CONTROL are special, USER_DEFINED is text
    return [
        {
            "id": number,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[piece.type],
        }
        for number, piece in enumerate(model.pieces)
        if piece.type in kinds
    ]


_OF_TEXT = (1, 4)  # NORMAL and USER_DEFINED: what a text can become
_NEVER = 1000.0
"""How far below the worst piece of text a control or byte piece is scored, so that its spelling is never taken for it."""


def _cut_controls(model: Any) -> dict[str, Any] | None:
    """Return a pre-tokenizer that cuts spelled control and byte pieces, such as "</s>", in two; None where none has to be.

    The library's unigram model has these pieces in its lattice. Scored low they lose to the characters of "</s>", but not
    where one of these is no piece itself: an unknown character is scored lower still. They are cut where no piece of
    text spans the cut, so it changes nothing else; and beside a known character if possible, since unknown ones in a row
    are one id only within a part.
    """
    of_text = [piece.piece for piece in model.pieces if piece.type in _OF_TEXT]
    known = {piece for piece in of_text if len(piece) == 1}
    pairs = {pair for piece in of_text for pair in zip(piece, piece[1:])}
    ends: dict[str, list[str]] = {}
    for text in (piece.piece for piece in model.pieces if piece.type not in _OF_TEXT):
        cuts = [cut for cut in range(1, len(text)) if (text[cut - 1], text[cut]) not in pairs]
        if cuts and not known.issuperset(text):
            cut = min(cuts, key=lambda cut: known.isdisjoint(text[cut - 1 : cut + 1]))
            ends.setdefault(text[:cut], []).append(text[cut:])
    if not ends:
        return None
    pattern = "|".join(
        f"{re.escape(begin)}(?={'|'.join(map(re.escape, rest))})" for begin, rest in sorted(ends.items())
    )
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "MergedWithPrevious", "invert": False}


def _unigram(model: Any) -> dict[str, Any]:
    worst = min((piece.score for piece in model.pieces if piece.type in _OF_TEXT), default=0.0) - _NEVER
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "vocab": [[piece.piece, piece.score if piece.type in _OF_TEXT else worst] for piece in model.pieces],
        "byte_fallback": model.trainer_spec.byte_fallback,
    }


def _bpe(model: Any) -> dict[str, Any]:
    """Return merges in the order of the merged piece's score: SentencePiece merges the best-scored pair first."""
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == 1}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocab[left], vocab[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.trainer_spec.unk_piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [[left, right] for *_rank, left, right in merges],
    }
