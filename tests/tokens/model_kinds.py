"""The kinds of SentencePiece models that an exact encoder is compared with SentencePiece on: options of its trainer."""

from __future__ import annotations

from typing import Any

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
