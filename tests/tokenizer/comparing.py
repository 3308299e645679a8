"""Whether transformers reads text as a tokenizer of Ekiden's does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ekiden.export.token_check import is_tie
from ekiden.tokenizer.load import SentencePieceTokenizer, Tokenizer


@dataclass
class Comparison:
    """Documents compared: equal ids; ties (another segmentation of the same score); different."""

    documents: int = 0
    equal: int = 0
    ties: int = 0
    different: int = 0

    def __str__(self) -> str:
        return f"{self.documents} documents: {self.equal} equal, {self.ties} ties, {self.different} different"


def compare_tokenizers(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> Comparison:
    """Count the texts whose ids differ between `tokenizer` and what AutoTokenizer loads from `folder`.

    SentencePiece sums a unigram model's scores in fp32 over the whole text, so segmentations whose exact scores differ
    by less than its rounding are decided by it: those count as ties.
    """
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(str(folder))
    result = Comparison()
    for text, expected in zip(texts, tokenizer.encode_batch(texts)):
        found = np.array(other.encode(text, add_special_tokens=False), dtype=np.int64)
        result.documents += 1
        if np.array_equal(found, expected):
            result.equal += 1
        elif (
            isinstance(tokenizer, SentencePieceTokenizer)
            and tokenizer.model_type == "unigram"
            and is_tie(tokenizer, expected.tolist(), found.tolist(), before=0.0)
        ):
            result.ties += 1
        else:
            result.different += 1
    return result
