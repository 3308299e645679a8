"""What the machine can do: device, precision, determinism, peak arithmetic.

Decisions go by compute capability and never by `torch.cuda.is_bf16_supported()`, which says True on a T4, where
bf16 is emulated and slow.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ekiden.errors import UsageError, UserError, nearest


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the matrix products; weights and optimizer stay fp32.

    name: fp32, bf16 or fp16; dtype: of autocast; use_scaler: fp16's gradients need loss scaling (38-58 % of a last
    layer's gate gradients lie below fp16's smallest number without).
    """

    name: str
    dtype: torch.dtype
    use_scaler: bool


_PRECISIONS = {
    "fp32": Precision("fp32", torch.float32, False),
    "bf16": Precision("bf16", torch.bfloat16, False),
    "fp16": Precision("fp16", torch.float16, True),
}


def named_precision(name: str) -> Precision:
    """Return the precision called `name`: fp32, bf16 or fp16; whether a device has it is `select_precision`'s matter."""
    return _PRECISIONS[name]


# Dense FLOP/s without TF32 from NVIDIA's data sheets, (fp16 and bf16, fp32) by a word of the device's name, the
# first that fits; the plain H100 and A100 are the SXM boards.
_PEAK_FLOPS = {
    r"H200": (989e12, 67e12),
    r"H100 PCIe": (756e12, 51e12),
    r"H100": (989e12, 67e12),
    r"A100": (312e12, 19.5e12),
    r"A10G": (70e12, 35e12),
    r"A10": (125e12, 31.2e12),
    r"L40S": (362e12, 91.6e12),
    r"L4": (121e12, 30.3e12),
    r"V100": (125e12, 15.7e12),
    r"T4": (65e12, 8.1e12),
    r"P100": (18.7e12, 9.3e12),
}


def select_device(requested: str) -> torch.device:
    """Return the device for `requested`: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: it is not there, or too old for this PyTorch.
    """
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise UserError(f"--device {requested} is not a device; give auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device {requested} is not supported; give auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise UserError(
            f"--device {requested} is not there ({count} CUDA devices seen); give --device cpu, or enable the GPU"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7:
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"{name} (compute capability {major}.{minor}) is not supported by current PyTorch builds; choose a T4 or "
            "newer (on Kaggle: accelerator GPU T4 x2), or --device cpu"
        )
    return torch.device("cuda", device.index or 0)


def select_precision(device: torch.device, requested: str) -> Precision:
    """Return the precision for `requested`: auto, fp32, bf16 or fp16.

    Raises:
        UserError: bf16 before compute capability 8.0, where it would be emulated.
        UsageError: no such precision.
    """
    if requested not in ("auto", *_PRECISIONS):
        names = ["auto", *_PRECISIONS]
        raise UsageError(
            f"--precision {requested} is not one of {', '.join(names)}{nearest(requested, names)}"
        )
    if device.type == "cpu":
        return _PRECISIONS["fp32" if requested == "auto" else requested]
    capability = torch.cuda.get_device_capability(device)
    if requested == "bf16" and capability < (8, 0):
        raise UserError(
            f"--precision bf16 needs compute capability 8.0 and {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}; give fp16"
        )
    return _PRECISIONS[("bf16" if capability >= (8, 0) else "fp16") if requested == "auto" else requested]


HALVES = (torch.bfloat16, torch.float16)


@functools.cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Return whether this machine's processor has instructions for matrix products of a half-precision type."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN says of any AVX-512 that it supports bf16, and emulates it.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())


_elsewhere = False


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let `in_fp32` not look at this processor: a step on CPU tensors without data stands for a GPU's (`planning`)."""
    global _elsewhere
    before, _elsewhere = _elsewhere, True
    try:
        yield
    finally:
        _elsewhere = before


def in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of `dtype` on `device` are done as fp32 products of rounded numbers (`modeling.half`).

    By what the processor has and never by a timing, which another start might read otherwise.
    """
    return not _elsewhere and device.type == "cpu" and dtype in HALVES and not has_instructions(dtype)


def configure_determinism(num_threads: int | None) -> int:
    """Make every sum come out the same in the next process; return the CPU threads that are pinned.

    The order of a CPU's sums follows the thread count, so it is fixed (default: the cores this process may use) and
    recorded. cuBLAS needs its workspace setting before the CUDA context exists.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    threads = num_threads or available_cores()
    torch.set_num_threads(threads)
    return threads


def available_cores() -> int:
    """Return the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Return the device's peak FLOP/s in `precision` from its data sheet; None where unknown.

    A device without bf16 tensor cores (before compute capability 8.0) has no figure for bf16.
    """
    for part, (half, single) in _PEAK_FLOPS.items():
        # Whole words: 'A100' is not an RTX A1000, 'L4' not an L40, 'T4' not a T400.
        if re.search(rf"(?<![A-Za-z0-9]){part}(?![A-Za-z0-9])", device_name):
            if precision.name == "bf16" and part in ("T4", "V100", "P100"):
                return None
            return single if precision.name == "fp32" else half
    return None
