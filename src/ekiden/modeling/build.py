"""A model from the settings: transformers' own GPT-2 and Gemma 3 classes, initialised from the seed.

The vocabulary and the special ids are the tokenizer's. Nothing here calls the model's own loss: the trainer takes
`hidden_states` and `head_weight` and computes the loss in chunks (`modeling.loss`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers import PretrainedConfig as ModelConfig

from ekiden.config import TrainConfig
from ekiden.modeling.associations import Associations, embedding_rows
from ekiden.modeling.attention import forward_arguments
from ekiden.modeling.local_heads import look_back

T = TypeVar("T")


def model_config(
    config: TrainConfig, vocab_size: int, pad_id: int | None, bos_id: int | None, eos_id: int | None
) -> ModelConfig:
    """Return transformers' configuration of the model that `config` describes.

    Dropout is 0 (pretraining sees its text about once); the key/value cache is off, so that nothing of one window
    reaches the next.
    """
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "pad_token_id": pad_id,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "use_cache": False,
        "attn_implementation": "sdpa",
        "tie_word_embeddings": True,
    }
    if config.model_type == "gpt2":
        return GPT2Config(
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_inner=config.intermediate_size,
            n_positions=config.max_length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    scaled = {"rope_type": "linear", "factor": config.rope_scaling_factor}
    full = scaled if config.rope_scaling_factor != 1.0 else {"rope_type": "default"}
    return Gemma3TextConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        # llama.cpp fixes the attention scale to 1/sqrt(head_dim); so do the released 1B and 4B.
        query_pre_attn_scalar=config.head_dim,
        intermediate_size=config.intermediate_size,
        sliding_window=config.sliding_window,
        max_position_embeddings=config.max_length,
        layer_types=[
            "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention"
            for layer in range(config.num_hidden_layers)
        ],
        rope_parameters={
            "full_attention": {**full, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        attention_dropout=0.0,
        **common,
    )


def build_model(
    config: TrainConfig,
    vocab_size: int,
    pad_id: int | None,
    bos_id: int | None,
    eos_id: int | None,
    seed: int,
    unigrams: np.ndarray | None = None,
    associations: Associations | None = None,
) -> PreTrainedModel:
    """Return the model on the CPU in fp32, its weights a function of `seed` (and the text's counts) alone.

    Drawn on the CPU on every machine: a GPU's random numbers differ from a CPU's.

    Args:
        unigrams: probability of each token, all above 0, that `initialization: unigram` and `cooccurrence` begin with; None:
            as `scaled`. associations: which tokens belong together, that `cooccurrence` begins with.
    """
    settings = model_config(config, vocab_size, pad_id, bos_id, eos_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family: Any = GPT2LMHeadModel if config.model_type == "gpt2" else Gemma3ForCausalLM
        model: PreTrainedModel = family(settings)
        if config.initialization != "huggingface":
            quieten_residual_branches(model, pad_id)
        if config.initialization == "cooccurrence" and associations is not None:
            place_by_company(head_weight(model), associations, seed)
        if config.initialization in ("unigram", "cooccurrence") and unigrams is not None:
            predict_unigrams(model, torch.from_numpy(np.log(unigrams)).float(), pad_id)
            if config.local_heads and config.model_type == "gemma3":
                look_back(model, math.sqrt(config.hidden_size) * CONSTANT / math.sqrt(CONSTANT**2 + 1))
    return model.float().train()


@torch.no_grad()
def quieten_residual_branches(model: PreTrainedModel, pad_id: int | None) -> None:
    """Start every block quiet beside the residual stream, and the embedding at standard deviation 1/sqrt(width).

    Gemma 3: post-norm gains of 1/sqrt(2L). Its post-norms make every sublayer add a vector of RMS 1 whatever its
    weights are, so GPT-2's scaling of the output projections (Radford et al. 2019) does nothing there; the gain of
    the post-norm is its equivalent. The embedding is multiplied by sqrt(width), which gives the stream RMS 1.

    GPT-2: matrices of standard deviation 1/sqrt(inputs), so that a unit vector stays one at any width, and output
    projections of zero, so that every block begins as the identity (Yang et al. 2022, arXiv:2203.03466, D.2).
    """
    decoder, embedding = body(model), head_weight(model)
    embedding.normal_(0.0, 1 / math.sqrt(embedding.shape[1]))
    if isinstance(model, GPT2LMHeadModel):
        for name, weight in decoder.h.named_parameters():  # type: ignore[union-attr]
            if name.endswith("c_proj.weight"):
                weight.zero_()
            elif weight.dim() == 2:  # [in, out]
                weight.normal_(0.0, 1 / math.sqrt(weight.shape[0]))
        return
    layers = decoder.layers
    for layer in layers:  # type: ignore[union-attr]
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.fill_(1 / math.sqrt(2 * len(layers)) - 1)  # type: ignore[arg-type]
    if pad_id is not None:
        embedding[pad_id].zero_()


@torch.no_grad()
def place_by_company(embedding: torch.Tensor, associations: Associations, seed: int) -> None:
    """Give tokens that stand in the same surroundings neighbouring rows, as long as the random ones; in all units but the first.

    A token of which nothing is known keeps its random row.
    """
    rows, known = embedding_rows(associations, embedding.shape[0], embedding.shape[1] - 1, seed)
    embedding[known, 1:] = rows[known]


FIRST_GAIN = 0.3
"""Of GPT-2's last norm at step 0, where it begins with unigram probabilities."""
CONSTANT = 2.0
"""First unit of Gemma 3's embedding there, beside rows of length 1."""


@torch.no_grad()
def predict_unigrams(model: PreTrainedModel, logs: torch.Tensor, pad_id: int | None) -> None:
    """Let a new model predict what it would otherwise spend its first steps on: how frequent each token is.

    The first unit of the last hidden state holds the same number whatever comes in, and the first unit of the embedding
    log p over that number, which the tied output reads. It also takes room in the last norm from what a tied model whose
    blocks do little predicts instead, its own input: nats above the unigrams' entropy.

    GPT-2: the last norm's bias is 1 there and its gain 0; the gain of the other units is FIRST_GAIN. Gemma 3, whose norms have no
    bias: every row of the embedding has CONSTANT there, which the blocks neither see nor change at first (their norms'
    gains are 0 there), so that of the stream's mean square d * (CONSTANT^2 + 1 + 1) it is the first term.

    Args:
        logs: natural logarithm of each token's probability, [vocabulary].
    """
    decoder: Any = body(model)
    embedding = head_weight(model)
    width = embedding.shape[1]
    above_mean = logs - (logs.exp() * logs).sum()
    if isinstance(model, GPT2LMHeadModel):
        embedding[:, 0] = above_mean
        decoder.wpe.weight[:, 0] = 0.0
        decoder.ln_f.weight.fill_(FIRST_GAIN)
        decoder.ln_f.weight[0] = 0.0
        decoder.ln_f.bias[0] = 1.0
        return
    constant = math.sqrt(width) * CONSTANT / math.sqrt(CONSTANT**2 + 2)
    embedding[:, 0] = CONSTANT + above_mean / constant
    if pad_id is not None:
        embedding[pad_id].zero_()
    for layer in decoder.layers:
        for name, norm in layer.named_children():
            if name.endswith("layernorm"):
                norm.weight[0] = -1.0  # a gain of 0: Gemma 3 adds 1


def body(model: nn.Module) -> nn.Module:
    """Return the decoder of a causal language model: token ids in, hidden states out."""
    return model.transformer if hasattr(model, "transformer") else model.model  # type: ignore[return-value]


def head_weight(model: nn.Module) -> torch.Tensor:
    """Return the output matrix [vocabulary, hidden], tied to the input embedding."""
    return model.get_output_embeddings().weight  # type: ignore[operator]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's blocks, in order."""
    decoder = body(model)
    return list(decoder.h if hasattr(decoder, "h") else decoder.layers)  # type: ignore[arg-type]


def inside_forward(model: nn.Module, work: Callable[..., T], *arguments: Any) -> T:
    """Return `work(*arguments)`, called as the model's forward pass.

    Where the weights are shards (`training.sharding`), the output matrix exists only in there.
    """
    within: Any = getattr(model, "inside_forward", None)
    return work(*arguments) if within is None else within(work, *arguments)


def hidden_states(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the hidden states [b, T, d] after the last norm for token ids [b, T]."""
    arguments = forward_arguments(model, input_ids)
    return body(model)(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return the parameters in blocks (and norms, positions), and in the tied embedding."""
    head, embedding = head_weight(model), model.get_input_embeddings().weight  # type: ignore[operator]
    # Both, since on the meta device transformers 5.0 leaves them untied.
    blocks = sum(p.numel() for p in model.parameters() if p is not head and p is not embedding)
    return blocks, head.numel()
