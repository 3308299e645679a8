"""The settings with which a run fits: as asked, or with what makes room, tried in the order of what it costs.

`planning.plan` asks `find_settings`, which traces a step (`planning.trace`, or `planning.sharded` where a run divides its
weights among GPUs) for as many settings as it takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ekiden.config import TrainConfig, validate
from ekiden.config_checks import AUTO
from ekiden.errors import UsageError, UserError
from ekiden.modeling.device import Precision
from ekiden.planning.devices import Machine
from ekiden.planning.trace import Peak, meta_counts, traced_peak
from ekiden.planning.words import flags
from ekiden.progress import say
from ekiden.training.sharding import is_divided_by_itself

Tracer = Callable[[TrainConfig, int, Precision, int], Peak]

REMEDIES: tuple[dict[str, Any], ...] = (
    {},
    {"activation_checkpointing": True},
    {"activation_checkpointing": True, "optimizer_moments": "bf16"},
    {"activation_checkpointing": True, "optimizer_moments": "8bit"},
    {"activation_checkpointing": True, "cpu_offload": True},
)
"""Settings that make room, in the order they are tried, each also with smaller microbatches: first what changes no
result, then what changes its last digits, then what is slow."""
BATCH = ("batch_size", "gradient_accumulation_steps")


@dataclass
class Found:
    """What one device does, whether that fits, and the change that makes it fit.

    config, peak: as asked; of an automatic microbatch the largest that fits, or the smallest there is with whatever needs
    least. change, changed_peak: what makes it fit (None: nothing does, or nothing has to). final: the settings with it.
    least: the smallest peak seen.
    """

    config: TrainConfig
    peak: Peak
    fits: bool
    change: dict[str, Any]
    changed_peak: Peak | None
    final: TrainConfig
    least: int


def find_settings(
    asked: TrainConfig,
    config: TrainConfig,
    vocab_size: int,
    precision: Precision,
    machine: Machine,
    tracer: Tracer,
) -> Found:
    """Trace a step, and where it does not fit, others that need less.

    Args:
        config: `asked`, as one device does it.
    """
    say(f"tracing a step of {config.batch_size} x {config.max_length} tokens")
    peak = tracer(config, vocab_size, precision, config.batch_size)
    if peak.total <= machine.usable_bytes:
        return Found(config, peak, True, {}, None, config, peak.total)
    found = smallest_change(config, vocab_size, precision, machine, peak, tracer)
    final = dataclasses.replace(config, **found.settings)
    if asked.batch_size != AUTO:
        return Found(config, peak, False, found.settings, found.peak, final, found.least)
    # A smaller microbatch is what was asked for, and no change.
    change = {name: value for name, value in found.settings.items() if name not in BATCH}
    if found.peak and not change:
        return Found(final, found.peak, True, {}, None, final, found.least)
    shown = {} if found.peak else found.least_settings
    smallest = dataclasses.replace(config, **batch_change(config, 1), **shown)
    one = tracer(smallest, vocab_size, precision, 1)
    least = min(found.least, one.total)
    return Found(smallest, one, False, change, found.peak, final if found.peak else smallest, least)


def on_machine(machine: Machine) -> Tracer:
    """Return what traces a step on one of the machine's devices: with whole weights, or shards where a run would shard."""

    def trace(config: TrainConfig, vocab_size: int, precision: Precision, microbatch: int) -> Peak:
        if machine.count > 1 and is_sharded(config, vocab_size, machine):
            return peak_in_shards(config, vocab_size, precision, microbatch, machine.count)
        return traced_peak(config, vocab_size, precision, microbatch, on_cpu=machine.name == "cpu")

    return trace


def peak_in_shards(
    config: TrainConfig, vocab_size: int, precision: Precision, microbatch: int, world: int
) -> Peak:
    """Return the peak of one of `world` GPUs that divide everything; an estimate where this PyTorch's FSDP cannot be traced."""
    from ekiden.planning.sharded import sharded_peak  # 1.5 s of imports that one device needs not

    try:
        return sharded_peak(config, vocab_size, precision, microbatch, world)
    except UserError:
        raise
    except Exception as error:  # whatever another PyTorch does: a plan is worth more than its traceback
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    whole = traced_peak(config, vocab_size, precision, microbatch)
    width = precision.dtype.itemsize
    parts = {
        name: size // world if name in ("weights", "gradients", "optimizer", "update") else size
        for name, size in whole.parts.items()
    }
    # Gathered: the embedding in fp32 and two blocks.
    parts["forward"] += 4 * whole.embedding + 2 * width * whole.blocks // config.num_hidden_layers
    return dataclasses.replace(whole, total=sum(parts.values()), parts=parts, estimated=reason)


def is_sharded(config: TrainConfig, vocab_size: int, machine: Machine) -> bool:
    """Return whether a run on all devices of `machine` divides the weights among them, as `training.sharding` decides."""
    if machine.count == 1 or config.parallel == "ddp":
        return False
    if config.parallel == "fsdp":
        return True
    return is_divided_by_itself(config, sum(meta_counts(config, vocab_size)), machine.total_bytes)


@dataclass
class Change:
    """The settings that make a run fit and their peak (None: none do); the smallest peak that was seen, and its settings."""

    settings: dict[str, Any]
    peak: Peak | None
    least: int
    least_settings: dict[str, Any]


def smallest_change(
    config: TrainConfig, vocab_size: int, precision: Precision, machine: Machine, whole: Peak, tracer: Tracer
) -> Change:
    """Return the first settings of REMEDIES that fit with some microbatch, and the largest such microbatch.

    The peak is nearly a straight line in the microbatch, so its two ends tell where to look, and the answer is traced
    itself. Where weights and gradients alone are too much nothing helps, and nothing is traced.
    """
    smallest, smallest_settings = whole.total, dict[str, Any]()
    if machine.count == 1 and whole.parts["weights"] + whole.parts["gradients"] > machine.usable_bytes:
        return Change({}, None, whole.parts["weights"] + whole.parts["gradients"], {})
    for remedy in REMEDIES:
        if not is_possible(config, remedy):
            continue
        changed = dataclasses.replace(config, **remedy)
        say(f"tracing with {flags(remedy) or 'smaller microbatches'}")
        least = tracer(changed, vocab_size, precision, 1)
        if least.total < smallest:
            smallest, smallest_settings = least.total, remedy
        if least.total > machine.usable_bytes:
            continue
        microbatch, peak = config.batch_size, whole
        if remedy and microbatch > 1:
            peak = tracer(changed, vocab_size, precision, microbatch)
        slope = (peak.total - least.total) / max(1, microbatch - 1)
        while microbatch > 1:
            if least.total + slope * (microbatch - 1) <= machine.usable_bytes:
                peak = tracer(changed, vocab_size, precision, microbatch)
                if peak.total <= machine.usable_bytes:
                    break
            microbatch //= 2
        change = batch_change(config, microbatch)
        if change.get("batch_size", microbatch) != microbatch:  # a size that divides the global batch
            peak = tracer(changed, vocab_size, precision, change["batch_size"])
        return Change({**remedy, **change}, peak if microbatch > 1 else least, smallest, remedy)
    return Change({}, None, smallest, smallest_settings)


def is_possible(config: TrainConfig, remedy: dict[str, Any]) -> bool:
    """Return whether the settings go together with this one, and their packages are installed."""
    if remedy and all(getattr(config, name) == value for name, value in remedy.items()):
        return False
    if config.parallel == "fsdp" and {"optimizer_moments", "cpu_offload"} & set(remedy):
        return False
    if "8bit" in remedy.values() and find_spec("bitsandbytes") is None:
        return False
    try:
        validate(dataclasses.replace(config, **remedy))
    except UsageError:
        return False
    return True


def batch_change(config: TrainConfig, microbatch: int) -> dict[str, Any]:
    """Return the settings of a smaller microbatch with the same global batch; of the same one: nothing."""
    if microbatch == config.batch_size:
        return {}
    while config.batch_size * config.gradient_accumulation_steps % microbatch:
        microbatch -= 1
    accumulation = config.batch_size * config.gradient_accumulation_steps // microbatch
    return {"batch_size": microbatch, "gradient_accumulation_steps": accumulation}
