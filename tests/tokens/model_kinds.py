"""The kinds of SentencePiece models that an exact encoder is compared with SentencePiece on, and unusual texts for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import sentencepiece

from ekiden.tokens.exact import NASTY

OURS = {
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "ours": OURS,
    "defaults": {},
    "no byte fallback": {**OURS, "byte_fallback": False, "character_coverage": 0.98},
    "space as suffix": {**OURS, "treat_whitespace_as_suffix": True, "add_dummy_prefix": True},
    "words of several spaces": {**OURS, "split_by_whitespace": False, "allow_whitespace_only_pieces": True},
    "user's symbols": {**OURS, "user_defined_symbols": ["<think>", "two words", "\n\n", "न्ह", "ab "]},
}
BPE_MODELS = {**MODELS, "nfkc without dummy prefix": {"add_dummy_prefix": False, "byte_fallback": True}}


def trained(
    kinds: dict[str, dict[str, Any]], model_type: str, sentences: list[str], folder: Path
) -> dict[str, Path]:
    """Return a model of each kind, trained on some texts."""
    found = {}
    for number, (name, options) in enumerate(kinds.items()):
        found[name] = folder / f"{number}.model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in sentences for line in text.split("\n")),
            model_prefix=str(found[name].with_suffix("")),
            model_type=model_type,
            vocab_size=500,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **options,
        )
    return found


def unusual(count: int, sentences: list[str]) -> list[str]:
    """Return strings of what is unusual, put together at random."""
    draw = random.Random(7)
    parts = [part for text in NASTY for part in (text, *text.split(" "))]
    parts += ["<think>", "two words", "\n\n", "न्ह", "ab ", "तो", "the ", "xyz", "é", "▁the", " ", "  "]
    parts += [word for text in sentences[::20] for word in text.split(" ")]
    return ["".join(draw.choices(parts, k=draw.randrange(12))) for _ in range(count)]
