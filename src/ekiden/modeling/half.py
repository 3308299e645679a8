"""Half precision on a CPU that has no instructions for it: products and attention in fp32, of numbers rounded to the type.

PyTorch emulates a bf16 product there in 3 to 4 times an fp32 one's time, and an fp16 one in 10 to 130 times
(docs/performance.md). The same arithmetic is an fp32 product of the rounded inputs whose result is rounded once: that is what
the instructions do, which add up in fp32. What is kept for the backward pass stays in the type, and no copy of a weight is
kept at all. `device.in_fp32` says where.

`prepare.prepare_model` gives the layers of a model `product`; `attention.run_kernel` takes `flash_attention` where the kernel
in C does not fit; `loss` rounds its inputs and goes on in fp32. They are operators and not formulas, whose roundings
Inductor leaves out (docs/experiments.md).
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ekiden.modeling.device import HALVES
from ekiden.modeling.kernels import gradients_like, outputs_like


def autocast_dtype(like: torch.Tensor) -> torch.dtype:
    """Return the type that autocast takes the inputs of products to; where there is no autocast, that of `like`."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `tensor` in fp32, its numbers those that `dtype` has."""
    return tensor.to(dtype).float()


# -- products ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("ekiden::half_product", mutates_args=(), device_types="cpu")
def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W + b in the type of `x` [..., i], for a weight [i, o] and a bias [o] of any type, rounded to that of `x`."""
    rows, matrix = x.flatten(0, -2).float(), _rounded(weight, x.dtype)
    made = torch.mm(rows, matrix) if bias is None else torch.addmm(_rounded(bias, x.dtype), rows, matrix)
    return made.to(x.dtype).view(*x.shape[:-1], -1)


@product.register_fake
def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.custom_op("ekiden::half_product_backward", mutates_args=(), device_types="cpu")
def _product_backward(
    upstream: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, biased: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, weight and a bias [o or 0], rounded to the type of x, as those of autocast are."""
    rows, given = x.flatten(0, -2).float(), upstream.flatten(0, -2).float()
    of_x = torch.mm(given, _rounded(weight, x.dtype).T).to(x.dtype).view(x.shape)
    of_weight = torch.empty_like(weight)  # laid out as the weight is
    if weight.stride(0) == 1:  # a Linear's, turned over
        of_weight.copy_(torch.mm(given.T, rows).to(x.dtype).T)
    else:
        of_weight.copy_(torch.mm(rows.T, given).to(x.dtype))
    of_bias = given.sum(0) if biased else given.new_empty(0)
    return of_x, of_weight, of_bias.to(x.dtype)


@_product_backward.register_fake
def _product_gradients(
    upstream: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, biased: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), x.new_empty(weight.shape[1] if biased else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    biased = ctx.bias_dtype is not None
    of_x, of_weight, of_bias = _product_backward(upstream, *ctx.saved_tensors, biased)
    return of_x, of_weight, of_bias.to(ctx.bias_dtype) if biased else None


product.register_autograd(_backward, setup_context=_save)


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what a Linear or a Conv1D makes of [..., i]; under autocast to half precision by `product`."""
    dtype = autocast_dtype(x)
    if dtype not in HALVES:
        return type(layer).forward(layer, x)
    weight = layer.weight if isinstance(layer, Conv1D) else layer.weight.t()
    return product(x.to(dtype), weight, layer.bias)


def install_half_products(block: nn.Module) -> None:
    """Let the linear layers of `block` multiply by `product`."""
    for layer in block.modules():
        if isinstance(layer, (nn.Linear, Conv1D)):
            layer.forward = types.MethodType(_linear, layer)  # type: ignore[method-assign]


# -- attention --------------------------------------------------------------------------------------------------

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Return PyTorch's flash attention [b, h, T, d] of half-precision tensors [b, h, T, d]; causal without a mask."""
    scale = 1 / math.sqrt(query.shape[3]) if scaling is None else scaling
    return _attention(query, key, value, mask, scale)[0]


@torch.library.custom_op("ekiden::half_attention", mutates_args=(), device_types="cpu")
def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [b, h, T, d], laid out [b, T, h, d], and the logarithms of the softmax's sums [b, h, T]."""
    kept, sums_kept = outputs_like(query)
    made, sums = _flash(
        query.float(), key.float(), value.float(), 0.0, mask is None,
        attn_mask=None if mask is None else mask.float(), scale=scale,
    )  # fmt: skip
    return kept.copy_(made), sums_kept.copy_(sums)


_attention.register_fake(outputs_like)


@torch.library.custom_op("ekiden::half_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    upstream: torch.Tensor,
    sums: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, laid out [b, T, h, d]."""
    made = gradients_like(query, key, value)
    # The sums as the forward pass lays them out, [b, T, h]: the kernel reads them by these strides.
    found = _flash_backward(
        upstream.float(), query.float(), key.float(), value.float(), out.float(), sums, 0.0, mask is None,
        attn_mask=None if mask is None else mask.float(), scale=scale,
    )  # fmt: skip
    for kept, gradient in zip(made, found, strict=True):
        kept.copy_(gradient)
    return made


_attention_backward.register_fake(gradients_like)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, mask, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, mask, *output)


def _backward_attention(
    ctx: Any, upstream: torch.Tensor, _sums: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    query, key, value, mask, out, sums = ctx.saved_tensors
    return *_attention_backward(query, key, value, mask, out, upstream, sums, ctx.scale), None, None


_attention.register_autograd(_backward_attention, setup_context=_save_attention)
