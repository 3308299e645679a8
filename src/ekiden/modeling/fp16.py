"""Gemma 3 in fp16 without overflow: the product of gate and up projections in fp32, scaled into range for the next one.

fp16 ends at 65,504. Under autocast the fp32 embedding keeps the residual stream and every norm in fp32, and all inputs of
matrix products are normalised but one: gelu(gate) x up, whose square grows with the weights. Here it is computed in
fp32 and divided, token by token, by a power of two that brings it below 2**8; the output is multiplied by it again
in fp32. Powers of two change no digit. Logits become fp32 before softmax in `modeling.loss`.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from transformers import PreTrainedModel

from ekiden.modeling.build import blocks

_TOP = 8
"""Exponent of the largest input of the down projection: leaves 8 bits for the sum over the inner width."""


def protect_from_overflow(model: PreTrainedModel) -> None:
    """Give every Gemma 3 feed-forward layer of `model` the product in fp32; other models are left as they are."""
    for block in blocks(model):
        mlp = getattr(block, "mlp", None)
        if mlp is not None and hasattr(mlp, "gate_proj"):
            mlp.forward = types.MethodType(_gated_in_range, mlp)


def _gated_in_range(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """Return down(gelu(gate(x)) * up(x)) in fp32, [b, T, d]; a Gemma 3 layer's forward pass."""
    product = mlp.act_fn(mlp.gate_proj(x).float()) * mlp.up_proj(x).float()
    scale = power_of_two_above(product.detach(), _TOP)
    return mlp.down_proj(product / scale).float() * scale


def power_of_two_above(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """Return for every row [..., 1] a power of two, at least 1, that brings its largest number to 2**exponent or less."""
    largest = values.abs().amax(dim=-1, keepdim=True)
    return torch.exp2(torch.ceil(torch.log2(largest.clamp(min=2.0**exponent))) - exponent)
