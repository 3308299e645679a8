"""What a session runs on and with: hardware, versions, model size, planned mixture, and where its time goes.

Nothing here decides anything. `session_facts` go into the start's event in the history; `environment`, `sums_of` and
`memory_savers`, kept with every checkpoint, are what has to be equal for a resumed run to be bit-identical.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import ekiden
from ekiden.config import TrainConfig
from ekiden.modeling.build import parameter_counts
from ekiden.modeling.device import Precision, available_cores, in_fp32, peak_flops
from ekiden.modeling.flops import flops_per_token
from ekiden.modeling.kernels import library
from ekiden.modeling.prepare import ARITHMETIC
from ekiden.training.ranks import Ranks
from ekiden.training.state import TrainingState

PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "numpy", "safetensors")


def session_facts(state: TrainingState, device: torch.device, precision: Precision) -> dict[str, Any]:
    """Return JSON facts: {"hardware", "versions", "model", "mixture"}; sizes in bytes, arithmetic in FLOP(/s)."""
    blocks, embedding = parameter_counts(state.model)
    hardware: dict[str, Any] = {
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(terse=True),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    peak = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {"device_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        peak = peak_flops(properties.name, precision)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = metadata.version(package)
    model = {
        "parameters_in_blocks": blocks,
        "parameters_in_embedding": embedding,
        "flops_per_token": flops_per_token(state.config, blocks + embedding),
        "peak_flops": peak,
    }
    return {
        "hardware": hardware,
        "versions": versions,
        "model": model,
        "mixture": state.mixture.as_dict(),
        "global_batch": state.counters.global_batch,
    }


def environment(device: torch.device, precision: Precision, threads: int, compiled: bool) -> dict[str, Any]:
    """Return what has to be equal for a resumed run to be bit-identical (on a CPU the thread count orders the sums)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    facts = {
        "device": name,
        "precision": precision.name,
        "compiled": compiled,
        "arithmetic": ARITHMETIC,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "ekiden": ekiden.__version__,
    }
    if device.type != "cpu":
        return facts
    if in_fp32(device, precision.dtype):
        facts["precision"] = f"{precision.name} by fp32 products"
    return facts | {"threads": threads, "kernels": "own" if library() else "PyTorch's"}


def sums_of(config: TrainConfig, ranks: Ranks, sharded: bool) -> dict[str, Any]:
    """Return what decides the order in which gradients are summed over ranks; with `--elastic-exact` nothing does."""
    if config.elastic_exact:
        return {"sums": "tree"}
    return {"ranks": ranks.world, "parallel": "fsdp" if sharded else "ddp"} if ranks.world > 1 else {}


def memory_savers(config: TrainConfig) -> dict[str, bool]:
    """Return the settings that may change on resume and compute some sums elsewhere or again."""
    savers = {
        "activation_checkpointing": config.activation_checkpointing,
        "cpu_offload": config.cpu_offload,
    }
    return {name: True for name, on in savers.items() if on}


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Clock:
    """Where the time of a session went, in seconds by what was done.

    Attributes:
        seconds: by name: starting (until the first step), training, evaluation, samples, saving (what training waits
            for a save). What no name covers is the rest of `total`.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` under `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time inside under `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def started(self) -> None:
        """End the time counted as starting."""
        self.add("starting", time.perf_counter() - self._began)

    def reading(self) -> dict[str, float]:
        """Return the seconds by name, and their `total` since the session began, rounded to milliseconds."""
        return {
            name: round(value, 3)
            for name, value in {**self.seconds, "total": time.perf_counter() - self._began}.items()
        }
