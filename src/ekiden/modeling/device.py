"""What the machine can do: device, precision, determinism, peak arithmetic.

Decisions go by compute capability and never by `torch.cuda.is_bf16_supported()`, which says True on a T4, where
bf16 is emulated and slow.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ekiden.errors import UserError


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

# Dense tensor-core FLOP/s from NVIDIA's data sheets, by a part of the device's name; (fp16 and bf16, fp32).
_PEAK_FLOPS = {
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A10G": (70e12, 35e12),
    "L4": (121e12, 30.3e12),
    "T4": (65e12, 8.1e12),
    "P100": (18.7e12, 9.3e12),
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
        raise UserError(f"--device {requested} is not there ({count} CUDA devices seen); give --device cpu, or enable the GPU")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7:
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"{name} (compute capability {major}.{minor}) is not supported by current PyTorch builds; choose a T4 or newer "
            "(on Kaggle: accelerator GPU T4 x2)"
        )
    return torch.device("cuda", device.index or 0)


def select_precision(device: torch.device, requested: str) -> Precision:
    """Return the precision for `requested`: auto, fp32, bf16 or fp16.

    Raises:
        UserError: fp16 on a CPU, where it is emulated (8 GFLOP/s against 54 in fp32).
    """
    if requested == "auto":
        if device.type == "cpu":
            requested = "fp32"
        else:
            requested = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if requested == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; give fp32 or bf16 on a CPU")
    return _PRECISIONS[requested]


def configure_determinism(num_threads: int | None) -> int:
    """Make every sum come out the same in the next process; return the CPU threads that are pinned.

    The order of a CPU's sums follows the thread count, so it is fixed (default: the cores this process may use) and
    recorded. cuBLAS needs its workspace setting before the CUDA context exists.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    threads = num_threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    return threads


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Return the device's peak FLOP/s in `precision` from its data sheet; None where unknown."""
    for part, (half, single) in _PEAK_FLOPS.items():
        if part in device_name:
            return single if precision.name == "fp32" else half
    return None
