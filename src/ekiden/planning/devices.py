"""The machines a run may be planned for, and how much of their arithmetic training gets out of them.

Memory is what PyTorch reports, less what the CUDA context, cuBLAS and fragments take. Efficiency is the share of the
data sheet's peak that reaches the model's own products (MFU): measured by `benchmarks/step.py` where that was run,
published by others for a plain GPT of similar size where it was, and else assumed; a plan says which.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass

import psutil
import torch

from ekiden.errors import UsageError, UserError, nearest
from ekiden.modeling.device import Precision, peak_flops

GIB = 2**30
FOUNDRY = "published for MPT on 8 of them (mosaicml/llm-foundry, scripts/train/benchmarking), not measured for Ekiden"
ASSUMED = "assumed, neither measured nor published"
PARALLEL_SHARE = 0.9
"""Of perfect scaling over the GPUs of one machine; assumed."""


@dataclass(frozen=True)
class Machine:
    """One kind of machine.

    Attributes:
        title: a GPU's name as CUDA reports it. count: GPUs. total_bytes, usable_bytes: a GPU's memory, and what a
            plan may fill of it. disk_bytes: room for a run's files, None where it depends; of this machine, what is free
            in the current folder. session_seconds: after which the machine is taken away, None where there is no fixed time.
        efficiency: (parameters, MFU) pairs. basis: where those come from.
    """

    name: str
    title: str
    count: int
    total_bytes: int
    usable_bytes: int
    precision: str
    efficiency: tuple[tuple[float, float], ...]
    basis: str
    disk_bytes: int | None = None
    session_seconds: float | None = None

    def mfu(self, parameters: int) -> float:
        """Return the efficiency for a model of this size: that of the nearest size known."""
        return min(self.efficiency, key=lambda pair: abs(math.log(pair[0] / parameters)))[1]


_THIRD = ((1e9, 0.30),)
_T4 = ("Tesla T4", 14.56, 13.3, "fp16", _THIRD, ASSUMED, 20 * 10**9, 12 * 3600.0)
_A10G = ("NVIDIA A10G", 22.0, 20.5, "bf16", _THIRD, ASSUMED, None, None)
_A100 = ((125e6, 0.43), (356e6, 0.49), (760e6, 0.53), (1.3e9, 0.56), (2.65e9, 0.58))
_H100 = ((760e6, 0.35), (1.3e9, 0.42), (2.65e9, 0.43), (6.7e9, 0.46))
_TABLE: dict[str, tuple[int, tuple]] = {
    "t4": (1, _T4),
    "t4x2": (2, _T4),
    "l4": (1, ("NVIDIA L4", 22.0, 20.5, "bf16", _THIRD, ASSUMED, None, None)),
    "a10g": (1, _A10G),
    "a10gx4": (4, _A10G),
    "a100": (1, ("NVIDIA A100-SXM4-40GB", 39.4, 37.5, "bf16", _A100, FOUNDRY, None, None)),
    "h100": (1, ("NVIDIA H100 80GB HBM3", 79.1, 76.5, "bf16", _H100, FOUNDRY, None, None)),
}
NAMES = (*_TABLE, "p100", "cpu")
CPU_EFFICIENCY = 0.5
"""Of the rate of one large product: assumed until `benchmarks/step.py` was run on the machine."""


def find_machine(name: str) -> Machine:
    """Return the machine called `name`.

    Raises:
        UserError: current PyTorch does not run on it. UsageError: no such machine.
    """
    if name == "p100":
        raise UserError(
            "--device p100: the P100 (compute capability 6.0) is not supported by current PyTorch builds; choose t4x2 "
            "(on Kaggle: accelerator GPU T4 x2)"
        )
    if name == "cpu":
        memory = psutil.virtual_memory()
        basis = "half of the rate of a large product, measured now on this machine; the half is assumed"
        usable = int(0.9 * memory.available)
        free = shutil.disk_usage(".").free
        return Machine("cpu", "cpu", 1, memory.total, usable, "fp32", ((1e9, CPU_EFFICIENCY),), basis, free)
    if name not in _TABLE:
        raise UsageError(f"--device {name} is not one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    count, (title, total, usable_gib, precision, efficiency, basis, disk, session) = _TABLE[name]
    return Machine(
        name,
        title,
        count,
        int(total * GIB),
        int(usable_gib * GIB),
        precision,
        efficiency,
        basis,
        disk,
        session,
    )


def machine_flops(machine: Machine, precision: Precision) -> float:
    """Return the peak FLOP/s of one of its devices: a data sheet's, or a CPU's as measured in half a second.

    Raises:
        UserError: the device has no such arithmetic.
    """
    if machine.name == "cpu":
        return measured_flops(precision.dtype)
    peak = peak_flops(machine.title, precision)
    if peak is None:
        raise UserError(
            f"--precision {precision.name} is not there on a {machine.title}; give {machine.precision}"
        )
    return peak


def measured_flops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """Return the FLOP/s of the fastest product of two `size` x `size` matrices on this CPU."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    fastest, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or fastest == math.inf:
        began = time.perf_counter()
        left @ right
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest
