"""Heads of a new Gemma 3's first block that look one, two and three tokens back from the first step on.

What stands just before a token says most about the next one, and a model without such heads spends many steps on
finding them. `modeling.build` calls this where a model begins with the text's frequencies: it needs the constant that
every row of the embedding then holds. Plain weights: nothing of it is left in the architecture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

OFFSETS = (1, 2, 3)
"""Tokens back, a head each; at least a quarter of the heads begins at random."""
PAIRS = 1 / 4
"""Share of a head's rotary pairs, the fastest, that tell positions; what the others say stays the text's."""
SCORE = 10.4
"""Logit of a query and the key that it looks for: that one then gets more than half of the attention."""
GAIN = 0.1
"""Of the block's first norm in the constant's unit."""


@torch.no_grad()
def look_back(model: nn.Module, constant: float) -> None:
    """Let the first heads of `model`'s first block attend to the tokens OFFSETS back, whatever they are.

    Rotary positions (Su et al. 2021, arXiv:2104.09864) turn pair f of a query or key by position * theta_f, so that a constant
    query turned by -offset * theta_f meets a constant key `offset` tokens back: sum_f cos((distance - offset) theta_f)
    is largest there. Both constants are columns of the projections' matrices, for the unit that is the same in every token.

    Args:
        constant: that unit's value after a norm of gain 1.
    """
    decoder: Any = model.model
    config, layer = decoder.config, decoder.layers[0]
    attention = layer.self_attn
    heads, width = config.num_attention_heads, config.head_dim
    offsets = OFFSETS[: heads * 3 // 4]
    if not offsets:
        return
    half = width // 2
    base = config.rope_parameters[config.layer_types[0]]["rope_theta"]
    turns = base ** (-torch.arange(half) / half)
    length = torch.zeros(half)
    fastest = max(1, round(half * PAIRS))
    length[:fastest] = math.sqrt(width / fastest)  # as long as the norms after the projections make it
    layer.input_layernorm.weight[0] = GAIN - 1
    query = attention.q_proj.weight[:, 0].view(heads, width)
    query.zero_()
    for head, offset in enumerate(offsets):
        query[head] = torch.cat([length * torch.cos(offset * turns), -length * torch.sin(offset * turns)])
    each = heads // config.num_key_value_heads
    keys = attention.k_proj.weight[:, 0].view(-1, width)[: -(-len(offsets) // each)]
    keys[:] = torch.cat([length, torch.zeros(half)])
    query /= constant * GAIN
    keys /= constant * GAIN
    attention.q_norm.weight.fill_(SCORE / math.sqrt(width) - 1)
