"""Which kernels a model's layers attend with: each is tried on the device, forward and backward; the first right one is taken.

What a kernel takes depends on the device, the width of a head, the type, the mask and PyTorch's version, and some fail only
when they are run (heads of 256 on sm_75 and sm_86). `prepare.prepare_model` asks `choose_attention` before training,
planning `planned_attention`, which tries nothing; `install_as_trained` is for a model that is evaluated. How the kernels are
used is `attention`'s matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from transformers import PreTrainedModel

from ekiden.config import TrainConfig
from ekiden.modeling import kernels
from ekiden.modeling.attention import (
    DOCUMENT_MASK,
    MATH,
    OWN,
    Attention,
    Kernel,
    additive_mask,
    document_boundary,
    install,
    run_kernel,
)
from ekiden.modeling.device import Precision

CANDIDATES = (
    Kernel(SDPBackend.FLASH_ATTENTION),
    Kernel(SDPBackend.FLASH_ATTENTION, grouped=False),
    Kernel(SDPBackend.CUDNN_ATTENTION),
    Kernel(SDPBackend.CUDNN_ATTENTION, grouped=False),
    Kernel(SDPBackend.EFFICIENT_ATTENTION),
    Kernel(SDPBackend.EFFICIENT_ATTENTION, grouped=False),
)
"""In order of speed (FlashAttention-2, arXiv:2307.08691, table 1); cuDNN's is refused in deterministic mode."""


def planned_attention(config: TrainConfig, boundary: tuple[int, bool] | None = None) -> Attention:
    """Return the attention of a device that has a flash kernel for everything, untried: for planning."""
    return _with_kernels(config, boundary, CANDIDATES[0], CANDIDATES[0])


def choose_attention(
    config: TrainConfig,
    device: torch.device,
    precision: Precision,
    boundary: tuple[int, bool] | None = None,
    candidates: Sequence[Kernel] = CANDIDATES,
    run: Callable[..., torch.Tensor] = run_kernel,
) -> Attention:
    """Return the first kernels that compute this model's attention on `device`, forward and backward, and do it right.

    Each is tried on a few heads, with the determinism that training has.

    Args:
        boundary: as in `Attention`. run: as `run_kernel`; tests put failing kernels there.
    """
    heads, groups, width = head_shape(config)
    shape = heads, groups, width, min(config.max_length, 256)

    def first_right(masked: bool) -> Kernel:
        own = (OWN,) if not masked and kernels.attends(device, precision.dtype, width) else ()
        for kernel in (*own, *candidates):
            if (heads != groups or kernel.grouped) and _is_right(
                kernel, shape, masked, device, precision.dtype, run
            ):
                return kernel
        return MATH

    plain = _with_kernels(config, boundary, MATH, MATH)
    return _with_kernels(
        config, boundary, first_right(masked=False), first_right(masked=True) if plain.masked else MATH
    )


def _with_kernels(
    config: TrainConfig, boundary: tuple[int, bool] | None, causal: Kernel, masked: Kernel
) -> Attention:
    window = config.sliding_window if config.model_type == "gemma3" else None
    needs_mask = boundary is not None or (window is not None and config.max_length > window)
    return Attention(causal, masked if needs_mask else None, window, boundary)


def head_shape(config: TrainConfig) -> tuple[int, int, int]:
    """Return query heads, key/value heads, and units a head."""
    heads = config.num_attention_heads
    if config.model_type == "gpt2":
        return heads, heads, config.hidden_size // heads
    return heads, config.num_key_value_heads, config.head_dim


def _is_right(
    kernel: Kernel,
    shape: tuple[int, int, int, int],
    masked: bool,
    device: torch.device,
    dtype: torch.dtype,
    run: Callable[..., torch.Tensor],
) -> bool:
    """Return whether `kernel` runs forward and backward, and gives what plain arithmetic in fp32 gives."""
    heads, groups, width, length = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, count, length, width) for count in (heads, groups, groups, heads)]
    *inputs, upstream = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    mask = None
    if masked:
        allowed = torch.ones(length, length, dtype=torch.bool).tril().triu(-(length // 2))
        mask = additive_mask(allowed.unsqueeze(0), torch.float32).to(device)

    def results(kernel: Kernel, run: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        made = run(kernel, *leaves, None if mask is None else mask.to(dtype))
        made.backward(upstream.to(dtype))
        return [made.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)]

    expected = results(MATH, run_kernel, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says at length why a kernel does not take this
        try:
            found = results(kernel, run, dtype)
        except (RuntimeError, NotImplementedError):
            return False
    # Relative to the largest number: 8 roundings of the type, and no NaN, which compares as false.
    allowed_error = 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-4
    return len(found) == len(expected) and all(
        bool((a - b).abs().max() <= allowed_error * b.abs().max()) for a, b in zip(found, expected)
    )


def install_as_trained(model: PreTrainedModel, precision: Precision) -> None:
    """Let a loaded model see what it saw in training: its own document, where its config.json says `document_mask`.

    Any other model is left as it is: with or without Ekiden's kernels its layers see the same.
    """
    settings: Any = model.config
    if not getattr(settings, DOCUMENT_MASK, False) or settings.model_type not in ("gpt2", "gemma3_text"):
        return
    heads = settings.num_attention_heads
    config = TrainConfig(
        model_type="gpt2" if settings.model_type == "gpt2" else "gemma3",
        hidden_size=settings.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(settings, "num_key_value_heads", heads),
        head_dim=getattr(settings, "head_dim", settings.hidden_size // heads),
        sliding_window=getattr(settings, "sliding_window", TrainConfig().sliding_window),
        max_length=settings.max_position_embeddings,
    )
    install(model, choose_attention(config, model.device, precision, document_boundary(settings)))
