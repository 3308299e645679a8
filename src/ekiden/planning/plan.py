"""`ekiden plan`: does a run fit a machine, how long does it take, how many sessions and how much disk.

`make_plan` takes settings, a vocabulary and a machine's name; `Plan.text()` is what the verb prints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ekiden.config import TrainConfig
from ekiden.errors import UsageError
from ekiden.modeling.device import named_precision
from ekiden.modeling.flops import flops_per_token
from ekiden.planning.devices import PARALLEL_SHARE, Machine, find_machine, machine_flops
from ekiden.planning.fitting import Tracer, find_settings, is_sharded, on_machine
from ekiden.planning.trace import Peak
from ekiden.planning.words import changes, next_command, plan_text
from ekiden.tokenizer.load import load_tokenizer
from ekiden.tokens.format import TokenDataset
from ekiden.training.order import steps_of_epochs
from ekiden.values import parse_bytes, parse_duration

RECOMPUTED = 4 / 3
"""Arithmetic of a step whose activations are computed twice: forward, forward again, and a backward pass of two."""
DEFAULT_VOCABULARY = 16_000
BYTES_PER_TOKEN = 4
"""Of text, where only its size is known: assumed."""


@dataclass
class Plan:
    """What a run needs. Bytes, seconds; a change is {setting: value}; None: not known or not needed.

    least_bytes: the smallest peak that was found with any settings. asked: the settings as they were given; `config` says
    what one device does where `peak` was seen. microbatch: with the change.
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
    microbatch: int
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
            "microbatch": self.microbatch,
            "peak_microbatch": self.config.batch_size,
            "peak_bytes": self.peak.total,
            "peak_parts": self.peak.parts,
            "peak_during": self.peak.during,
            "peak_estimated": self.peak.estimated,
            "host_bytes": self.peak.host,
            "usable_bytes": self.machine.usable_bytes,
            "sharded": self.sharded,
            "fits": self.fits,
            "change": self.change,
            "changed_peak_bytes": self.changed_peak.total if self.changed_peak else None,
            "least_bytes": self.least_bytes,
            "tokens_per_second": self.tokens_per_second,
            "efficiency": self.efficiency,
            "efficiency_basis": self.machine.basis,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "sessions": self.sessions,
            "checkpoint_bytes": self.checkpoint_bytes,
            "run_bytes": self.run_bytes,
            "disk_bytes": self.disk_bytes,
            "settings": changes(self),
            "next": next_command(self),
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
    each = on_each_device(config, machine.count)
    precision = named_precision(machine.precision if config.precision == "auto" else config.precision)
    flops = machine_flops(machine, precision)
    found = find_settings(config, each, vocab_size, precision, machine, tracer or on_machine(machine))
    final, parameters = found.final, found.peak.blocks + found.peak.embedding
    sharded = is_sharded(final, vocab_size, machine)
    if tokens is None and config.max_steps:
        tokens = config.max_steps * config.samples_per_step(machine.count) * config.max_length
    moments = moment_bytes(final, found.changed_peak or found.peak) * (machine.count if sharded else 1)
    checkpoint = 4 * parameters + moments
    return Plan(
        config=found.config,
        vocab_size=vocab_size,
        machine=machine,
        precision=precision.name,
        peak=found.peak,
        fits=found.fits,
        change=as_asked(found.change, config) if found.changed_peak else None,
        changed_peak=found.changed_peak,
        tokens_per_second=speed(final, parameters, machine, flops),
        efficiency=machine.mfu(parameters),
        tokens=tokens,
        checkpoint_bytes=checkpoint,
        # The new one is durable before the oldest goes; best/ and final_model/ are weights.
        run_bytes=(config.max_checkpoints + 1) * checkpoint + 8 * parameters,
        disk_bytes=disk_bytes if disk_bytes is not None else machine.disk_bytes,
        session_seconds=parse_duration(config.max_time, "--max-time") or machine.session_seconds,
        least_bytes=found.least,
        asked=config,
        microbatch=final.batch_size,
        sharded=sharded,
    )


def speed(config: TrainConfig, parameters: int, machine: Machine, flops: float) -> float:
    """Return the tokens a second of all devices together, of which each makes `flops` at its peak."""
    count = machine.count * (PARALLEL_SHARE if machine.count > 1 else 1)
    again = RECOMPUTED if config.activation_checkpointing else 1
    return count * flops * machine.mfu(parameters) / (flops_per_token(config, parameters) * again)


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
    tokenizer: str = "",
) -> Iterator[Plan]:
    """Yield a plan for each of `devices`, as `ekiden plan` was asked.

    Args:
        vocab_size: None: that of `tokenizer` (a file, folder or hub id), else the tokenizer's of `config.dataset_path`,
            else 16,000. disk: bytes as 100GB; empty: unknown.
        tokens: None: as `config.max_steps` says, else what `text` (bytes as 20GB) may hold, else the shards' epochs.

    Raises:
        UserError, UsageError: as `make_plan`; there are no shards at `dataset_path`, or two settings say the same.
    """
    devices = list(devices)
    for device in devices:  # before a minute's work for the others
        find_machine(device)
    lengths = {"--tokens": tokens, "--text": text, "--max-steps": config.max_steps}
    given = [name for name, value in lengths.items() if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both say how long the run is; give one of them")
    if tokens is not None and tokens < 1:
        raise UsageError("--tokens must be at least 1")
    if tokenizer and vocab_size is not None:
        raise UsageError("--tokenizer and --vocab-size both say how many pieces there are; give one of them")
    room, size = parse_bytes(disk, "--disk"), parse_bytes(text, "--text")
    for name, said, value in (("--disk", disk, room), ("--text", text, size)):
        if value is not None and value < 10**5:
            raise UsageError(f"{name} {said} is {value:,} bytes; give it with a unit, as 20GB")
    if tokenizer:
        vocab_size = load_tokenizer(tokenizer).vocab_size
    if tokens is None and text:
        tokens = int((size or 0) / BYTES_PER_TOKEN * (config.epochs or 1))
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


def moment_bytes(config: TrainConfig, peak: Peak) -> int:
    """Return the bytes of the optimizer's state in a checkpoint."""
    if config.cpu_offload:  # beside copies of weights and gradients, which no checkpoint holds
        return peak.host - 8 * (peak.blocks + peak.embedding)
    return peak.parts["optimizer"]
