"""A tokenizer and models small enough to make in a second, for the tests of exports and generation."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece
import torch
from transformers import PreTrainedModel

from ekiden.config import build_config
from ekiden.modeling.build import build_model
from ekiden.tokenizer.load import Tokenizer, load_tokenizer

TEXT = """The river runs down from the hill and the children run beside it until the evening.
Nobody counts the stones; there are too many, and the water moves them every spring.
नदी पहाड़ से नीचे आती है और बच्चे शाम तक उसके साथ दौड़ते हैं।
पत्थर कोई नहीं गिनता, वे बहुत हैं, और पानी उन्हें हर साल हिला देता है।
De rivier loopt van de heuvel naar beneden en de kinderen lopen mee tot de avond valt.
""".splitlines()


def small_tokenizer(folder: Path, model_type: str = "unigram", **options: object) -> Tokenizer:
    """Train a tokenizer of 340 pieces with byte fallback and pad, bos and eos ids into `folder`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4),
        model_writer=model,
        model_type=model_type,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
        **{"vocab_size": 340, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, **options},
    )
    path = folder / f"{model_type}.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def small_model(preset: str, tokenizer: Tokenizer, louder: float = 4.0, **changes: object) -> PreTrainedModel:
    """Return a model of a few layers; weights `louder` times the usual, so that logits differ visibly."""
    shape = {"hidden_size": 32, "num_hidden_layers": 7, "num_attention_heads": 4, "head_dim": 8}
    heads = 4 if preset.startswith("gpt2") else 2
    shape |= {"intermediate_size": 48, "num_key_value_heads": heads, "max_length": 32, "sliding_window": 6}
    # GPT-2's scaled start has output projections of zero, behind which nothing of a block is seen.
    config = build_config(preset, **{"initialization": "huggingface", **shape, **changes})
    model = build_model(
        config, tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, seed=5
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(louder) if weight.dim() == 2 else weight.add_(0.1)
    return model
