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
from ekiden.planning.devices import GIB, PARALLEL_SHARE, Machine, find_machine, machine_flops
from ekiden.planning.trace import Peak, traced_peak
from ekiden.progress import human_count, human_duration, say
from ekiden.tokens.format import TokenDataset
from ekiden.training.recipe import describe_recipe
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
RECOMPUTED = 4 / 3
"""Arithmetic of a step whose activations are computed twice: forward, forward again, and a backward pass of two."""
DEFAULT_VOCABULARY = 16_000
CHINCHILLA = 20
"""Tokens a parameter that a training run of given cost should see (Hoffmann et al. 2022, arXiv:2203.15556)."""


@dataclass
class Plan:
    """What a run needs. Bytes, seconds; a change is {setting: value}; None: not known or not needed.

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
        machine, peak = self.machine, self.peak
        gpus = f"{machine.count} x {machine.title}" if machine.name != "cpu" else "this machine's CPU"
        lines = [
            f"{self.config.preset} on {machine.name} ({gpus}, {self.precision}), vocabulary {self.vocab_size:,}",
            _line(
                "parameters",
                f"{human_count(peak.blocks)} in blocks + {human_count(peak.embedding)} in the embedding = "
                f"{human_count(self.parameters)}",
            ),
            _line(
                "memory",
                f"{_gib(peak.total)} at the worst moment ({peak.during}) with {self.config.batch_size} x "
                f"{self.config.max_length} tokens: {_parts(peak)}",
            ),
            _line("", self._verdict()),
            _line("speed", self._speed()),
            _line("time", self._time()),
            _line("disk", self._disk()),
        ]
        return "\n".join([*lines, *(describe_recipe(self.config) if self.says_recipe else [])])

    def _verdict(self) -> str:
        usable = f"{_gib(self.machine.usable_bytes)} of {_gib(self.machine.total_bytes)} can be planned with"
        if self.fits:
            return f"fits: {usable}"
        if self.change is None or self.changed_peak is None:
            return f"DOES NOT FIT: {usable}, and no setting makes it fit; lower --max-length or choose a smaller preset"
        flags = " ".join(_flag(name, value) for name, value in self.change.items())
        host = f" and {_gib(self.changed_peak.host)} of the host's" if self.changed_peak.host else ""
        return f"DOES NOT FIT: {usable}; it fits with {flags} ({_gib(self.changed_peak.total)}{host}), same global batch"

    def _speed(self) -> str:
        least = min(size for size, _ in self.machine.efficiency)
        smaller = f"; for {human_count(least)} parameters: with fewer it may be much less"
        basis = self.machine.basis + (
            smaller if self.machine.name != "cpu" and self.parameters < least / 4 else ""
        )
        return (
            f"{human_count(self.tokens_per_second)} tokens/s, at {self.efficiency:.0%} of the peak ({basis})"
        )

    def _time(self) -> str:
        if self.seconds is None:
            tokens = CHINCHILLA * self.parameters
            duration = human_duration(tokens / self.tokens_per_second)
            return f"{duration} for {human_count(tokens)} tokens ({CHINCHILLA} a parameter); give --tokens or --max-steps"
        text = f"{human_duration(self.seconds)} for {human_count(self.tokens or 0)} tokens"
        if self.sessions is None:
            return text
        number = f"{self.sessions} session{'s' if self.sessions > 1 else ''}"
        return f"{text}: {number} of {human_duration(self.session_seconds or 0)}"

    def _disk(self) -> str:
        kept = f"{_gb(self.checkpoint_bytes)} a checkpoint, {_gb(self.run_bytes)} for a run that keeps "
        kept += f"{self.config.max_checkpoints}, with one being written, best/ and final_model/"
        if self.disk_bytes is None:
            return kept
        room = f"of {_gb(self.disk_bytes)}"
        if self.run_bytes <= self.disk_bytes:
            return f"{kept}, {room}"
        weights = 8 * self.parameters
        number = (self.disk_bytes - weights) // self.checkpoint_bytes - 1
        if number >= 2:
            return f"{kept}: TOO MUCH {room}; give --max-checkpoints {number}"
        return f"{kept}: TOO MUCH {room} for even 2 checkpoints; choose a smaller preset or mirror them elsewhere"


def make_plan(
    config: TrainConfig,
    vocab_size: int,
    device: str,
    tokens: int | None = None,
    disk_bytes: int | None = None,
    tracer: Tracer = traced_peak,
) -> Plan:
    """Return what training `config` with a vocabulary of `vocab_size` pieces needs on `device`.

    Args:
        device: one of `planning.devices.NAMES`. tokens: of the whole run; None: from `max_steps` where that is set.
        disk_bytes: room for the run directory; None: the machine's, where it has a known one.

    Raises:
        UserError, UsageError: no such machine, or nothing that PyTorch runs on; no such precision there.
    """
    machine = find_machine(device)
    automatic, samples = config.batch_size == AUTO, config.samples_per_step(machine.count)
    config = on_each_device(config, machine.count)
    precision = named_precision(machine.precision if config.precision == "auto" else config.precision)
    flops = machine_flops(machine, precision)
    say(f"tracing a step of {config.batch_size} x {config.max_length} tokens")
    peak = tracer(config, vocab_size, precision, config.batch_size)
    fits = peak.total <= machine.usable_bytes
    change, changed_peak = None, None
    if not fits:
        change, changed_peak = smallest_change(config, vocab_size, precision, machine, peak, tracer)
    if automatic and change and changed_peak and "batch_size" in change and len(change) == 2:
        # A smaller microbatch is what was asked for, and no change.
        config, peak, fits = dataclasses.replace(config, **change), changed_peak, True
        change = changed_peak = None
    final = dataclasses.replace(config, **(change or {}))
    parameters = peak.blocks + peak.embedding
    efficiency = machine.mfu(parameters)
    count = machine.count * (PARALLEL_SHARE if machine.count > 1 else 1)
    again = RECOMPUTED if final.activation_checkpointing else 1
    rate = count * flops * efficiency / (flops_per_token(final, parameters) * again)
    if tokens is None and config.max_steps:
        tokens = config.max_steps * samples * config.max_length
    checkpoint = 4 * parameters + moment_bytes(final, changed_peak or peak)
    return Plan(
        config,
        vocab_size,
        machine,
        precision.name,
        peak,
        fits,
        change,
        changed_peak,
        rate,
        efficiency,
        tokens,
        checkpoint,
        # The new one is durable before the oldest goes; best/ and final_model/ are weights.
        (config.max_checkpoints + 1) * checkpoint + 8 * parameters,
        disk_bytes if disk_bytes is not None else machine.disk_bytes,
        parse_duration(config.max_time, "--max-time") or machine.session_seconds,
    )


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
    config: TrainConfig, devices: Iterable[str], vocab_size: int | None, tokens: int | None, disk: str
) -> Iterator[Plan]:
    """Yield a plan for each of `devices`, as `ekiden plan` was asked.

    Args:
        vocab_size: None: the tokenizer's of `config.dataset_path`, or 16,000. disk: bytes as 100GB; empty: unknown.

    Raises:
        UserError, UsageError: as `make_plan`; or there are no shards at `dataset_path`.
    """
    room = parse_bytes(disk, "--disk")
    if vocab_size is None and config.dataset_path:
        vocab_size = TokenDataset.open(config.dataset_path).tokenizer().vocab_size
    if vocab_size is not None and vocab_size < 3:
        raise UsageError(f"--vocab-size {vocab_size} is too small; give the number of a tokenizer's pieces")
    tracer = remembering(traced_peak)
    for index, device in enumerate(devices):
        made = make_plan(config, vocab_size or DEFAULT_VOCABULARY, device, tokens, room, tracer)
        made.says_recipe = index == 0
        yield made


def remembering(tracer: Tracer) -> Tracer:
    """Return `tracer`, tracing the same step once: devices of one precision differ in what they have, not in what it takes."""
    known: dict[tuple[str, int, str, int], Peak] = {}

    def trace(config: TrainConfig, vocab_size: int, precision: Precision, microbatch: int) -> Peak:
        # The trace takes the microbatch it is told, and accumulates two whatever the settings say.
        alike = dataclasses.replace(config, batch_size=microbatch, gradient_accumulation_steps=1)
        key = repr(alike), vocab_size, precision.name, microbatch
        if key not in known:
            known[key] = tracer(config, vocab_size, precision, microbatch)
        return known[key]

    return trace


def smallest_change(
    config: TrainConfig, vocab_size: int, precision: Precision, machine: Machine, whole: Peak, tracer: Tracer
) -> tuple[dict[str, Any] | None, Peak | None]:
    """Return the first settings of REMEDIES that fit with some microbatch, the largest such microbatch, and the peak.

    (None, None) where nothing fits. The peak is nearly a straight line in the microbatch, so its two ends tell where
    to look, and the answer is traced itself.
    """
    for remedy in REMEDIES:
        if not is_possible(config, remedy):
            continue
        changed = dataclasses.replace(config, **remedy)
        say(f"tracing with {' '.join(_flag(*item) for item in remedy.items()) or 'smaller microbatches'}")
        least = tracer(changed, vocab_size, precision, 1)
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
        peak = peak if microbatch > 1 else least
        return {**remedy, **batch_change(config, microbatch)}, peak
    return None, None


def is_possible(config: TrainConfig, remedy: dict[str, Any]) -> bool:
    """Return whether the settings go together with this one, and their packages are installed."""
    if remedy and all(getattr(config, name) == value for name, value in remedy.items()):
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


def _line(label: str, text: str) -> str:
    return f"{label:<12}{text}"


def _parts(peak: Peak) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in peak.parts.items() if size >= GIB // 200)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if value is True else f"{flag} {value}"
