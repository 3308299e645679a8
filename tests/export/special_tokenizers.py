"""Tokenizers with settings that `ekiden tokenizer train` never chooses, as users bring them."""

from __future__ import annotations

import io

import sentencepiece

from ekiden.tokenizer.load import SENTENCEPIECE_FILE, SentencePieceTokenizer
from small_models import TEXT


def special_tokenizer(model_type: str = "unigram", **options: object) -> SentencePieceTokenizer:
    """Train a tokenizer of 340 pieces; SentencePiece's own defaults hold (nmt_nfkc, single spaces) but for `options`."""
    model = io.BytesIO()
    settings = {"vocab_size": 340, "byte_fallback": True, "character_coverage": 1.0, **options}
    settings |= {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4),
        model_writer=model,
        model_type=model_type,
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    return SentencePieceTokenizer({SENTENCEPIECE_FILE: model.getvalue()})
