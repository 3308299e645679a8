"""Attention and the softmax of the loss in C (`native/`), for fp32 on processors with AVX-512, where there is a C compiler.

Half precision, where the processor has no instructions for it, is taken to fp32 and the result rounded.

Compiled once for a machine (two seconds), with the instructions that all processors of this kind have, so that every one of
them computes the same numbers; the number of threads changes none. On AVX2 PyTorch's own kernels were the faster ones
(docs/performance.md). `modeling.attention_choice` tries this one before PyTorch's, `modeling.loss` asks `softmax_kernel`. With
EKIDEN_KERNEL=0, or without a compiler, PyTorch's are used, and results differ in their last bits.
"""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ekiden.modeling.device import in_fp32
from ekiden.native_code import allowed, compiled, find_compiler

SOURCES = sorted(Path(__file__).with_name("native").glob("*.[ch]"))
OPTIONS = [
    "-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma",
]  # fmt: skip
LANES, MOST_UNITS = 16, 128
"""Units a head are a multiple of one (a register) and not above the other, where PyTorch's attention is the faster one."""

TASKS, PART_KEYS = 16, 256
"""With fewer heads in a batch than the one, each head's keys are divided among tasks, of the other number or more each."""

_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Shape(ctypes.Structure):
    """`shape` of native/attention.c."""

    _fields_ = [
        *((name, _NUMBER) for name in ("batch", "heads", "groups", "tokens", "units", "window")),
        *((name, _NUMBER * 3) for name in ("q", "k", "v", "o", "g")),
        ("gradient_row", _NUMBER),
        ("threads", _NUMBER),
        ("scale", ctypes.c_float),
    ]


_ARGUMENTS: dict[str, list[Any]] = {
    "attention_forward": [ctypes.POINTER(_Shape), *[_POINTER] * 5],
    "attention_backward": [ctypes.POINTER(_Shape), *[_POINTER] * 10, _NUMBER],
    "softmax_minus_target": [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 2, *[_NUMBER] * 2],
    "column_sums": [_POINTER, *[_NUMBER] * 2, *[_POINTER] * 2, _NUMBER],
    "bias_gelu": [*[_POINTER] * 2, *[_NUMBER] * 2, _POINTER, _NUMBER],
    "bias_gelu_backward": [*[_POINTER] * 3, *[_NUMBER] * 2, *[_POINTER] * 3, _NUMBER],
    "norm_backward": [*[_POINTER] * 5, *[_NUMBER] * 2, *[_POINTER] * 4, _NUMBER],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions; None where the processor or the compiler is not there, or it does not compile them."""
    compiler = find_compiler()
    if compiler is None or not allowed() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        found = ctypes.CDLL(str(compiled(compiler, SOURCES, OPTIONS, ["-lm"])))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, arguments in _ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
        getattr(found, name).restype = None
    return found


# -- attention --------------------------------------------------------------------------------------------------


def attends(device: torch.device, dtype: torch.dtype, units: int) -> bool:
    """Return whether `attention` computes heads of `units` here."""
    fits = units % LANES == 0 and units <= MOST_UNITS
    typed = dtype == torch.float32 or in_fp32(device, dtype)
    return device.type == "cpu" and typed and fits and library() is not None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Return causal attention [b, h, T, d] of query [b, h, T, d] and key, value [b, g, T, d], g dividing h.

    Args:
        scaling: of the scores; None: 1 / sqrt(d). window: tokens that each one sees, itself included; None: all before it.

    Raises:
        RuntimeError: not for this type, device or width.
    """
    length, units = query.shape[2:]
    scale = 1 / math.sqrt(units) if scaling is None else scaling
    return _attention(query, key, value, scale, min(window or length, length))[0]


def _shape_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    upstream: torch.Tensor,
    scale: float,
    window: int,
    gradient_row: int = 0,
) -> _Shape:
    batch, heads, length, units = query.shape
    row, threads = gradient_row or heads * units, torch.get_num_threads()
    strides = [(_NUMBER * 3)(*t.stride()[:3]) for t in (query, key, value, out, upstream)]
    return _Shape(batch, heads, key.shape[1], length, units, window, *strides, row, threads, scale)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return it with the numbers of a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _floats(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return them in fp32, with the numbers of a row side by side."""
    return [_rows(tensor.float()) for tensor in tensors]


def outputs_like(query: torch.Tensor, *_others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for an output [b, h, T, d], laid out [b, T, h, d], in the type of `query`, and for fp32 sums [b, h, T]."""
    batch, heads, length, units = query.shape
    made = query.new_empty((batch, length, heads, units)).transpose(1, 2)
    return made, query.new_empty((batch, heads, length), dtype=torch.float32)


def gradients_like(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return memory for the gradients of these [b, h, T, d], laid out [b, T, h, d]."""
    return outputs_like(query)[0], outputs_like(key)[0], outputs_like(value)[0]


def _pointers(*tensors: torch.Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@torch.library.custom_op("ekiden::attention", mutates_args=(), device_types="cpu")
def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [b, h, T, d], laid out [b, T, h, d], and the logarithms of the softmax's sums [b, h, T]."""
    found = library()  # not asked in `attention`, which a compiler reads
    fits = attends(query.device, query.dtype, query.shape[3]) and query.shape[2] == key.shape[2]
    if found is None or not fits:
        raise RuntimeError(
            "the attention kernel takes fp32 on a CPU with AVX-512, heads of 16, 32 ... 128 units"
        )
    dtype = query.dtype
    query, key, value = _floats(query, key, value)
    out, sums = outputs_like(query)
    shape = _shape_of(query, key, value, out, out, scale, window)
    found.attention_forward(ctypes.byref(shape), *_pointers(query, key, value, out, sums))
    return out.to(dtype), sums


_attention.register_fake(outputs_like)


def _run_backward(shape: _Shape, *tensors: torch.Tensor) -> None:
    """Call `attention_backward` with query, key, value, output, its gradient, sums, and the memory of three gradients."""
    found = library()
    assert found is not None
    tensors = tuple(tensor.contiguous() if place == 5 else tensor for place, tensor in enumerate(tensors))
    heads = shape.batch * shape.heads
    parts = max(1, min(TASKS // heads, shape.tokens // PART_KEYS))
    scratch = tensors[0].new_empty((parts - 1, heads, shape.tokens, shape.units))
    found.attention_backward(ctypes.byref(shape), *_pointers(*tensors, scratch), parts)


@torch.library.custom_op("ekiden::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    upstream: torch.Tensor,
    sums: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, laid out [b, T, heads, d]."""
    dtype = query.dtype
    query, key, value, out, upstream = _floats(query, key, value, out, upstream)
    batch, heads, length, units = query.shape
    made = [query.new_empty((batch, length, heads, units)) for _ in range(3)]
    shape = _shape_of(query, key, value, out, upstream, scale, window)
    _run_backward(shape, query, key, value, out, upstream, sums, *made)
    groups = key.shape[1]
    if groups != heads:  # the kernel's are those of every query head by itself
        made[1:] = [gradient.unflatten(2, (groups, heads // groups)).sum(3) for gradient in made[1:]]
    of_query, of_key, of_value = (gradient.to(dtype).transpose(1, 2) for gradient in made)
    return of_query, of_key, of_value


_attention_backward.register_fake(gradients_like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, upstream: torch.Tensor, _sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key, value, out, sums = ctx.saved_tensors
    return *_attention_backward(query, key, value, out, upstream, sums, ctx.scale, ctx.window), None, None


_attention.register_autograd(_backward, setup_context=_save)


def packed_attention(mixed: torch.Tensor, heads: int) -> torch.Tensor:
    """Return causal attention [b, T, h d] of queries, keys and values side by side, [b, T, 3 h d]; so is its gradient.

    Raises:
        RuntimeError: as `attention`.
    """
    return _packed(mixed, heads)[0]


def _unpacked(mixed: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """Return views of query, key and value [b, h, T, d] of [b, T, 3 h d]."""
    return [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in mixed.chunk(3, dim=2)]


@torch.library.custom_op("ekiden::packed_attention", mutates_args=(), device_types="cpu")
def _packed(mixed: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [b, T, h d] and the logarithms of the softmax's sums [b, h, T]."""
    query, key, value = _unpacked(mixed.float(), heads)
    made, sums = _attention(query, key, value, 1 / math.sqrt(query.shape[3]), query.shape[2])
    return made.transpose(1, 2).flatten(2).to(mixed.dtype), sums


@_packed.register_fake
def _packed_outputs(mixed: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, width = mixed.shape
    sums = mixed.new_empty((batch, heads, length), dtype=torch.float32)
    return mixed.new_empty((batch, length, width // 3)), sums


@torch.library.custom_op("ekiden::packed_attention_backward", mutates_args=(), device_types="cpu")
def _packed_backward(
    mixed: torch.Tensor, out: torch.Tensor, upstream: torch.Tensor, sums: torch.Tensor, heads: int
) -> torch.Tensor:
    """Return the gradient [b, T, 3 h d] of `mixed`."""
    query, key, value = _unpacked(mixed.float(), heads)
    length, units = query.shape[2:]
    out, upstream = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in _floats(out, upstream))
    made = torch.empty(mixed.shape)
    shape = _shape_of(query, key, value, out, upstream, 1 / math.sqrt(units), length, 3 * heads * units)
    parts = [made[..., part * heads * units :] for part in range(3)]
    _run_backward(shape, query, key, value, out, upstream, sums, *parts)
    return made.to(mixed.dtype)


@_packed_backward.register_fake
def _packed_gradient(mixed: torch.Tensor, *_others: Any) -> torch.Tensor:
    return mixed.new_empty(mixed.shape)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    mixed, ctx.heads = inputs
    ctx.save_for_backward(mixed, *output)


def _backward_packed(ctx: Any, upstream: torch.Tensor, _sums: torch.Tensor) -> tuple[torch.Tensor, None]:
    mixed, out, sums = ctx.saved_tensors
    return _packed_backward(mixed, out, upstream, sums, ctx.heads), None


_packed.register_autograd(_backward_packed, setup_context=_save_packed)


# -- the loss ---------------------------------------------------------------------------------------------------


def softmax_kernel(logits: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor] | None:
    """Return what takes fp32 blocks of these `logits`, as `_softmax_minus_target`; None where PyTorch has to do it."""
    real = not isinstance(logits, FakeTensor) and logits.device.type == "cpu"
    fits = real and logits.stride(-1) == 1 and logits.dtype != torch.float64
    return _softmax_minus_target if fits and library() is not None else None


def _softmax_minus_target(logits: torch.Tensor, targets: torch.Tensor, write: bool) -> torch.Tensor:
    """Return -log softmax(logits)[target] of every row [n]; with `write` softmax - onehot stands in the logits' place.

    Args:
        logits: fp32 [n, V], lost where `write` is false. targets: int64 [n], all within 0 to V - 1.
    """
    found = library()
    assert found is not None
    rows, pieces = logits.shape
    targets = targets.contiguous()
    losses = logits.new_empty(rows)
    found.softmax_minus_target(
        logits.data_ptr(), rows, pieces, logits.stride(0), targets.data_ptr(), losses.data_ptr(), write, torch.get_num_threads()
    )  # fmt: skip
    return losses
