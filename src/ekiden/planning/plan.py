"""`ekiden plan`: does a run fit a machine, how long does it take, how many sessions and how much disk.

`make_plan` takes settings, a vocabulary and a machine's name; `Plan.text()` is what the verb prints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ekiden.config import TrainConfig, validate
from ekiden.config_checks import AUTO
from ekiden.errors import UsageError
from ekiden.modeling.device import Precision, named_precision
from ekiden.modeling.flops import flops_per_token
from ekiden.planning.devices import PARALLEL_SHARE, Machine, find_machine, machine_flops
from ekiden.planning.trace import Peak, meta_counts, traced_peak
from ekiden.planning.words import flags, plan_text
from ekiden.progress import say
from ekiden.tokens.format import TokenDataset
from ekiden.training.order import steps_of_epochs
from ekiden.training.sharding import is_divided_by_itself
from ekiden.values import parse_bytes, parse_duration

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
RECOMPUTED = 4 / 3
"""Arithmetic of a step whose activations are computed twice: forward, forward again, and a backward pass of two."""
DEFAULT_VOCABULARY = 16_000
BYTES_PER_TOKEN = 4
"""Of text, where only its size is known: assumed."""


@dataclass
class Plan:
    """What a run needs. Bytes, seconds; a change is {setting: value}; None: not known or not needed.

    least_bytes: the smallest peak that was found with any settings. asked: the settings as they were given; `config` says
    what one device does.
    says_recipe: whether `text` ends with the recipe, which is the same on every device.
    """

    config: TrainConfig
    vocab_size: int
    machine: Machine
    precision: str
    peak: Peak
    fits: bool
    change: dict[str, Any] | None
    changed_peak: Peak | None
    tokens_per_second: float
    efficiency: float
    tokens: int | None
    checkpoint_bytes: int
    run_bytes: int
    disk_bytes: int | None
    session_seconds: float | None
    least_bytes: int
    asked: TrainConfig
    sharded: bool = False
    says_recipe: bool = True

    @property
    def parameters(self) -> int:
        """All of the model's."""
        return self.peak.blocks + self.peak.embedding

    @property
    def seconds(self) -> float | None:
        """Of training, without evaluations, saves and start-up."""
        return self.tokens / self.tokens_per_second if self.tokens else None

    @property
    def sessions(self) -> int | None:
        """Legs of the relay; a tenth of each is left for starting, evaluating and saving."""
        if self.seconds is None or self.session_seconds is None:
            return None
        return math.ceil(self.seconds / (0.9 * self.session_seconds))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "preset": self.config.preset,
            "device": self.machine.name,
            "devices": self.machine.count,
            "precision": self.precision,
            "vocab_size": self.vocab_size,
            "parameters": self.parameters,
            "block_parameters": self.peak.blocks,
            "embedding_parameters": self.peak.embedding,
            "microbatch": self.config.batch_size,
            "peak_bytes": self.peak.total,
            "peak_parts": self.peak.parts,
            "peak_during": self.peak.during,
            "host_bytes": self.peak.host,
            "usable_bytes": self.machine.usable_bytes,
            "sharded": self.sharded,
            "fits": self.fits,
            "change": self.change,
            "changed_peak_bytes": self.changed_peak.total if self.changed_peak else None,
            "tokens_per_second": self.tokens_per_second,
            "efficiency": self.efficiency,
            "efficiency_basis": self.machine.basis,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "sessions": self.sessions,
            "checkpoint_bytes": self.checkpoint_bytes,
            "run_bytes": self.run_bytes,
            "disk_bytes": self.disk_bytes,
        }

    def text(self) -> str:
        """Return the plan for people."""
        return plan_text(self)


def make_plan(
    config: TrainConfig,
    vocab_size: int,
    device: str,
    tokens: int | None = None,
    disk_bytes: int | None = None,
    tracer: Tracer | None = None,
) -> Plan:
    """Return what training `config` with a vocabulary of `vocab_size` pieces needs on `device`.

    Args:
        device: one of `planning.devices.NAMES`. tokens: of the whole run; None: from `max_steps` where that is set.
        disk_bytes: room for the run directory; None: the machine's, where it has a known one.

    Raises:
        UserError, UsageError: no such machine, or nothing that PyTorch runs on; no such precision there.
    """
    machine = find_machine(device)
    asked, samples = config, config.samples_per_step(machine.count)
    config = on_each_device(config, machine.count)
    precision = named_precision(machine.precision if config.precision == "auto" else config.precision)
    flops = machine_flops(machine, precision)
    tracer = tracer or on_machine(machine)
    say(f"tracing a step of {config.batch_size} x {config.max_length} tokens")
    peak = tracer(config, vocab_size, precision, config.batch_size)
    found = Change({}, peak, peak.total)
    if peak.total > machine.usable_bytes:
        found = smallest_change(config, vocab_size, precision, machine, peak, tracer)
    if asked.batch_size == AUTO and found.peak and found.settings:
        # A smaller microbatch is what was asked for, and no change.
        size = {name: found.settings.pop(name) for name in BATCH if name in found.settings}
        config = dataclasses.replace(config, **size)
        peak = peak if found.settings else found.peak
    fits = found.peak is not None and not found.settings
    final = dataclasses.replace(config, **found.settings)
    parameters = peak.blocks + peak.embedding
    efficiency = machine.mfu(parameters)
    count = machine.count * (PARALLEL_SHARE if machine.count > 1 else 1)
    again = RECOMPUTED if final.activation_checkpointing else 1
    rate = count * flops * efficiency / (flops_per_token(final, parameters) * again)
    if tokens is None and config.max_steps:
        tokens = config.max_steps * samples * config.max_length
    moments = moment_bytes(final, found.peak or peak)
    sharded = is_sharded(final, vocab_size, machine)
    checkpoint = 4 * parameters + moments * (machine.count if sharded else 1)
    return Plan(
        config,
        vocab_size,
        machine,
        precision.name,
        peak,
        fits,
        as_asked(found.settings, asked) if found.peak and not fits else None,
        found.peak if not fits else None,
        rate,
        efficiency,
        tokens,
        checkpoint,
        # The new one is durable before the oldest goes; best/ and final_model/ are weights.
        (config.max_checkpoints + 1) * checkpoint + 8 * parameters,
        disk_bytes if disk_bytes is not None else machine.disk_bytes,
        parse_duration(config.max_time, "--max-time") or machine.session_seconds,
        found.least,
        asked,
        sharded,
    )


def on_machine(machine: Machine) -> Tracer:
    """Return what traces a step on one of the machine's devices: with whole weights, or shards where a run would shard."""

    def trace(config: TrainConfig, vocab_size: int, precision: Precision, microbatch: int) -> Peak:
        if machine.count > 1 and is_sharded(config, vocab_size, machine):
            from ekiden.planning.sharded import sharded_peak  # 1.5 s of imports that one device needs not

            return sharded_peak(config, vocab_size, precision, microbatch, machine.count)
        return traced_peak(config, vocab_size, precision, microbatch)

    return trace


def is_sharded(config: TrainConfig, vocab_size: int, machine: Machine) -> bool:
    """Return whether a run on all devices of `machine` divides the weights among them, as `training.sharding` decides."""
    if machine.count == 1 or config.parallel == "ddp":
        return False
    if config.parallel == "fsdp":
        return True
    return is_divided_by_itself(config, sum(meta_counts(config, vocab_size)), machine.total_bytes)


def as_asked(change: dict[str, Any], asked: TrainConfig) -> dict[str, Any]:
    """Return the settings of `change` that go with those that were asked for, which may say the global batch."""
    return {
        name: value
        for name, value in change.items()
        if not (asked.global_batch_size and name == "gradient_accumulation_steps")
    }


def on_each_device(config: TrainConfig, devices: int) -> TrainConfig:
    """Return settings whose microbatch and accumulation say what each device does; an automatic microbatch is all of it."""
    if not config.global_batch_size:
        return config
    share = -(-config.global_batch_size // devices)
    microbatch = min(config.batch_size or share, share)
    return dataclasses.replace(
        config,
        batch_size=microbatch,
        gradient_accumulation_steps=-(-share // microbatch),
        global_batch_size=0,
    )


def plans(
    config: TrainConfig,
    devices: Iterable[str],
    vocab_size: int | None,
    tokens: int | None,
    disk: str,
    text: str = "",
) -> Iterator[Plan]:
    """Yield a plan for each of `devices`, as `ekiden plan` was asked.

    Args:
        vocab_size: None: the tokenizer's of `config.dataset_path`, or 16,000. disk: bytes as 100GB; empty: unknown.
        tokens: None: as `config.max_steps` says, else what `text` (bytes as 20GB) may hold, else the shards' epochs.

    Raises:
        UserError, UsageError: as `make_plan`; or there are no shards at `dataset_path`.
    """
    room = parse_bytes(disk, "--disk")
    if tokens is None and text:
        tokens = int((parse_bytes(text, "--text") or 0) / BYTES_PER_TOKEN * (config.epochs or 1))
    if config.dataset_path:
        dataset = TokenDataset.open(config.dataset_path)
        vocab_size = dataset.tokenizer().vocab_size if vocab_size is None else vocab_size
        if tokens is None and not config.max_steps:
            tokens = steps_of_epochs(config, dataset, 1) * config.max_length
    if vocab_size is not None and vocab_size < 3:
        raise UsageError(f"--vocab-size {vocab_size} is too small; give the number of a tokenizer's pieces")
    for index, device in enumerate(devices):
        made = make_plan(config, vocab_size or DEFAULT_VOCABULARY, device, tokens, room)
        made.says_recipe = index == 0
        yield made


@dataclass
class Change:
    """The settings that make a run fit and their peak (None: none do), and the smallest peak that was seen."""

    settings: dict[str, Any]
    peak: Peak | None
    least: int


def smallest_change(
    config: TrainConfig, vocab_size: int, precision: Precision, machine: Machine, whole: Peak, tracer: Tracer
) -> Change:
    """Return the first settings of REMEDIES that fit with some microbatch, and the largest such microbatch.

    The peak is nearly a straight line in the microbatch, so its two ends tell where to look, and the answer is traced
    itself. Where weights and gradients alone are too much nothing helps, and nothing is traced.
    """
    smallest = whole.total
    if machine.count == 1 and whole.parts["weights"] + whole.parts["gradients"] > machine.usable_bytes:
        return Change({}, None, whole.parts["weights"] + whole.parts["gradients"])
    for remedy in REMEDIES:
        if not is_possible(config, remedy):
            continue
        changed = dataclasses.replace(config, **remedy)
        say(f"tracing with {flags(remedy) or 'smaller microbatches'}")
        least = tracer(changed, vocab_size, precision, 1)
        smallest = min(smallest, least.total)
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
        return Change({**remedy, **change}, peak if microbatch > 1 else least, smallest)
    return Change({}, None, smallest)


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


def moment_bytes(config: TrainConfig, peak: Peak) -> int:
    """Return the bytes of the optimizer's state in a checkpoint."""
    if config.cpu_offload:  # beside copies of weights and gradients, which no checkpoint holds
        return peak.host - 8 * (peak.blocks + peak.embedding)
    return peak.parts["optimizer"]


def batch_change(config: TrainConfig, microbatch: int) -> dict[str, Any]:
    """Return the settings of a smaller microbatch with the same global batch; of the same one: nothing."""
    if microbatch == config.batch_size:
        return {}
    while config.batch_size * config.gradient_accumulation_steps % microbatch:
        microbatch -= 1
    accumulation = config.batch_size * config.gradient_accumulation_steps // microbatch
    return {"batch_size": microbatch, "gradient_accumulation_steps": accumulation}
