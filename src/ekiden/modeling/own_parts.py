"""Parts of a block in C (`native/rows.c`) for fp32 on a CPU with AVX-512: GELU behind a bias, norms' and biases' gradients.

A compiled sum over rows walks down columns, 4 KB from number to number: of GPT-2's GELU backward, 22 ms of one thread's time for
4,096 x 1,024 numbers, two thirds were the bias's gradient. Here every array is read once, row by row. GPT-2's attention
takes queries, keys and values side by side as their product leaves them, and leaves their gradients so.

`prepare.prepare_model` calls `install_own_parts` after `install_fast_parts`. Forward passes of norms stay the compiler's; not
compiled, norms and biases are PyTorch's.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ekiden.modeling import kernels
from ekiden.modeling.attention import OWN
from ekiden.modeling.build import blocks, body

PART = 128
"""Rows whose sums are taken together, as in native/rows.c."""


def _scratch(like: torch.Tensor, sums: int) -> torch.Tensor:
    """Return memory for `sums` sums of each part of the rows of `like` [rows, n]."""
    return like.new_empty((sums, -(-like.shape[0] // PART), like.shape[1]))


def _call(name: str, *arguments: torch.Tensor | int | None) -> None:
    """Call a function of the library with the addresses of tensors and the number of threads."""
    found = kernels.library()
    assert found is not None
    given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(found, name)(*given, torch.get_num_threads())


@torch.library.custom_op("ekiden::column_sums", mutates_args=(), device_types="cpu")
def column_sums(x: torch.Tensor) -> torch.Tensor:
    """Return the sums [n] of fp32 rows [..., n]."""
    rows = x.contiguous().flatten(0, -2)
    sums = x.new_empty(x.shape[-1])
    _call("column_sums", rows, *rows.shape, sums, _scratch(rows, 1))
    return sums


@column_sums.register_fake
def _sums(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[-1])


class AddBias(torch.autograd.Function):
    """x + bias, [..., n]; part of the compiled loop that reads it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        return x + bias

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Return both gradients."""
        return upstream, column_sums(upstream)


# -- GELU -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("ekiden::bias_gelu", mutates_args=(), device_types="cpu")
def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return gelu(x + bias), [..., n], in its form with a tanh (as `fast_parts.TanhGelu`)."""
    rows = x.contiguous().flatten(0, -2)
    made = torch.empty_like(rows)
    _call("bias_gelu", rows, bias, *rows.shape, made)
    return made.view(x.shape)


@bias_gelu.register_fake
def _gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ekiden::bias_gelu_backward", mutates_args=(), device_types="cpu")
def _gelu_backward(
    upstream: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `x` and `bias`."""
    rows = x.contiguous().flatten(0, -2)
    made, sums = torch.empty_like(rows), torch.empty_like(bias)
    _call("bias_gelu_backward", upstream.contiguous(), rows, bias, *rows.shape, made, sums, _scratch(rows, 1))
    return made.view(x.shape), sums


@_gelu_backward.register_fake
def _gelu_gradients(
    upstream: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _gelu_backward(upstream, *ctx.saved_tensors)


bias_gelu.register_autograd(_backward, setup_context=_save)

# -- norms ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("ekiden::norm_backward", mutates_args=(), device_types="cpu")
def _norm_backward(
    upstream: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor | None,
    scale: torch.Tensor,
    gain: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x [..., n], gain [n] and a bias [n] in (x - mean) scale gain (+ bias)."""
    rows = x.contiguous().flatten(0, -2)
    made, gains, biases = torch.empty_like(rows), torch.empty_like(gain), torch.empty_like(gain)
    middle = None if mean is None else mean.contiguous()
    _call(
        "norm_backward", upstream.contiguous(), rows, middle, scale.contiguous(), gain.contiguous(), *rows.shape, made, gains,
        biases, _scratch(rows, 2),
    )  # fmt: skip
    return made.view(x.shape), gains, biases


@_norm_backward.register_fake
def _norm_gradients(
    upstream: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor | None,
    scale: torch.Tensor,
    gain: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), gain.new_empty(gain.shape), gain.new_empty(gain.shape)


class Norm(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) gain + bias over the last dimension; without `bias` root mean squares, no mean."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """Return it, [..., n]."""
        if bias is None:
            mean, scale = None, torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            made = x * scale * gain
        else:
            variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
            scale = torch.rsqrt(variance + eps)
            made = (x - mean) * scale * gain + bias
        ctx.centred = bias is not None
        ctx.save_for_backward(x, scale, gain, *(() if mean is None else (mean,)))
        return made

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x, gain and bias."""
        x, scale, gain, *mean = ctx.saved_tensors
        made, gains, biases = _norm_backward(upstream, x, mean[0] if mean else None, scale, gain)
        return made, gains, biases if ctx.centred else None, None


# -- what models have in their places ---------------------------------------------------------------------------


def _fits(x: torch.Tensor, gain: torch.Tensor | None = None) -> bool:
    typed = x.dtype == torch.float32 and (gain is None or gain.dtype == torch.float32)
    return typed and x.shape[-1] % kernels.LANES == 0


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return x W + b of a Conv1D."""
    if not torch.compiler.is_compiling() or not (_fits(x) and layer.bias.shape[0] % kernels.LANES == 0):
        return Conv1D.forward(layer, x)
    return AddBias.apply(x @ layer.weight, layer.bias)


def _mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """Return GPT-2's feed-forward part of [b, T, d]."""
    product = x @ mlp.c_fc.weight
    if not _fits(product):
        return type(mlp).forward(mlp, x)
    return mlp.dropout(mlp.c_proj(bias_gelu(product, mlp.c_fc.bias)))


def _attend(layer: Any, x: torch.Tensor, *others: Any, **named: Any) -> tuple[torch.Tensor, None]:
    """Return GPT-2's attention layer of [b, T, d], as a block calls it."""
    masks = named.get("ekiden_masks")
    if (
        masks is None
        or masks["full"] is not None
        or layer.attention.causal != OWN
        or x.dtype != torch.float32  # then the product is, or autocast's type
    ):
        return type(layer).forward(layer, x, *others, **named)
    made = kernels.packed_attention(layer.c_attn(x), layer.num_heads)
    return layer.resid_dropout(layer.c_proj(made)), None


def _layer_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_compiling() or not _fits(x, norm.weight):
        return nn.LayerNorm.forward(norm, x)
    return Norm.apply(x, norm.weight, norm.bias, norm.eps)


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_compiling() or not _fits(x, norm.weight):
        return type(norm).forward(norm, x)
    return Norm.apply(x, 1.0 + norm.weight, None, norm.eps)


def _put(module: nn.Module, forward: Any) -> None:
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def install_own_parts(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the blocks of a `model` on the CPU these in the places of transformers' own, where it has such.

    Gemma 3's norms of queries and keys, whose rows are not side by side, stay as they are.

    Args:
        dtype: of the products; in half precision, where `modeling.half` has the layers, only norms of fp32 numbers and
            attention are taken.
    """
    decoder: Any = body(model)
    if model.config.model_type == "gemma3_text":
        norms = [
            norm
            for block in blocks(model)
            for name, norm in block.named_children()
            if name.endswith("layernorm")
        ]
        for norm in (*norms, decoder.norm):
            _put(norm, _rms_norm)
    if model.config.model_type != "gpt2":
        return
    for block in blocks(model):
        part: Any = block
        if not model.config.scale_attn_by_inverse_layer_idx and model.config.scale_attn_weights:
            _put(part.attn, _attend)
        for norm in (part.ln_1, part.ln_2):
            _put(norm, _layer_norm)
        if dtype == torch.float32:
            _put(part.mlp, _mlp)
            for layer in block.modules():
                if isinstance(layer, Conv1D):
                    _put(layer, _linear)
    _put(decoder.ln_f, _layer_norm)
