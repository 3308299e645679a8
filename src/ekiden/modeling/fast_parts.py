"""Two parts of transformers' blocks by the same formulas with less work: GELU, and GPT-2's layers with a bias.

A compiled tanh is slow on a CPU: 31 ms of one thread's time for 4,096 x 1,024 numbers, forward and backward, which was 6 %
of a GPT-2's step. 1 + tanh(y) is 2 / (1 + exp(-2y)): 14 ms. And `addmm` copies the bias into every row of its result before
the product; added afterwards it becomes part of the compiled loop that reads the result anyway. Not compiled, PyTorch's own
kernels of these are the faster ones: 29 ms for a GELU that transformers' GPT-2 makes of eight operations in 77 ms.

`prepare.prepare_model` calls `install_fast_parts`. `benchmarks/step.py` times whole steps.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ekiden.modeling.build import blocks

_TWICE = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715


class TanhGelu(nn.Module):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016, arXiv:1606.08415), any shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return it for every number of `x`."""
        if torch.compiler.is_compiling():
            return x * torch.sigmoid(x * (_TWICE + _TWICE * _CUBIC * x * x))
        return gelu(x, approximate="tanh")


def _add_bias_later(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return x W + b, [..., out]; the forward pass of a Conv1D, whose weight is [in, out]."""
    if torch.compiler.is_compiling():
        product = x @ layer.weight
        return product + layer.bias.to(product.dtype)  # as under autocast `addmm` takes it
    return Conv1D.forward(layer, x)


def install_fast_parts(model: PreTrainedModel) -> None:
    """Give the blocks of `model` these in the places of transformers' own, where it has such."""
    if model.config.model_type not in ("gpt2", "gemma3_text"):
        return
    for block in blocks(model):
        mlp: Any = block.mlp
        if hasattr(mlp, "act_fn"):
            mlp.act_fn = TanhGelu()
        else:
            mlp.act = TanhGelu()
        for layer in block.modules():
            if isinstance(layer, Conv1D):
                layer.forward = types.MethodType(_add_bias_later, layer)  # type: ignore[method-assign]
