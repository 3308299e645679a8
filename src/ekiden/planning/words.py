"""A plan in words, for somebody who decides what to do next: short lines, each under its label."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from ekiden.config import TrainConfig, build_config
from ekiden.config_checks import AUTO
from ekiden.planning.devices import GIB
from ekiden.planning.trace import Peak
from ekiden.progress import human_count, human_duration
from ekiden.training.recipe import describe_recipe

if TYPE_CHECKING:
    from ekiden.planning.plan import Plan

WIDTH = 100
LABEL = 10
CHINCHILLA = 20
"""Tokens a parameter that a training run of given cost should see (Hoffmann et al. 2022, arXiv:2203.15556)."""


_SHARDED = "weights, gradients and moments are divided among the GPUs (FSDP, by --parallel)"


def plan_text(plan: Plan) -> str:
    """Return `plan` as lines of at most 100 characters (flags are never cut in two)."""
    machine, peak, config = plan.machine, plan.peak, plan.config
    gpus = f"{machine.count} x {machine.title}" if machine.name != "cpu" else "this machine's CPU"
    lines = [f"{config.preset} on {machine.name}: {gpus}, {plan.precision}; vocabulary {plan.vocab_size:,}"]
    size = f"{human_count(plan.parameters)} parameters: {human_count(peak.blocks)} in blocks, "
    each = " on each GPU" if machine.count > 1 else ""
    sections = [
        ("size", [f"{size}{human_count(peak.embedding)} in the embedding"]),
        (
            "memory",
            [
                f"{gib(peak.total)}{each} at the worst moment ({peak.during}) with {config.batch_size} x "
                f"{config.max_length} tokens",
                _parts(peak),
                *_verdict(plan),
                *([_SHARDED] if plan.sharded else []),
            ],
        ),
        ("speed", _speed(plan)),
        ("time", _time(plan)),
        ("disk", _disk(plan)),
        ("next", _next(plan)),
    ]
    for label, texts in sections:
        for number, text in enumerate(texts):
            lines += _wrapped("" if number else label, text)
    return "\n".join([*lines, *(describe_recipe(config) if plan.says_recipe else [])])


def _wrapped(label: str, text: str) -> list[str]:
    first, later = f"  {label:<{LABEL - 2}}", " " * LABEL
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _parts(peak: Peak) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in peak.parts.items() if size >= GIB // 200)


def _verdict(plan: Plan) -> list[str]:
    machine = plan.machine
    usable = f"{gib(machine.usable_bytes)} of {gib(machine.total_bytes)} can be planned with"
    if plan.fits:
        return [f"fits: {usable}"]
    if plan.change is None or plan.changed_peak is None:
        needs = f"at the least it needs {gib(plan.least_bytes)}"
        return [
            f"DOES NOT FIT: {usable}, and no setting makes it fit ({needs}); {_way_out(plan)}",
        ]
    host = f" and {gib(plan.changed_peak.host)} of the host's" if plan.changed_peak.host else ""
    return [
        f"DOES NOT FIT: {usable}; it fits with",
        flags(plan.change),
        f"({gib(plan.changed_peak.total)}{host}; same global batch)",
    ]


def _way_out(plan: Plan) -> str:
    if plan.machine.count > 1:
        return "lower --max-length, or choose a smaller preset or a device with more memory"
    standing = sum(plan.peak.parts[name] for name in ("weights", "gradients"))
    if standing > plan.machine.usable_bytes:
        return "choose a smaller preset or a device with more memory"
    return "lower --max-length or --vocab-size, or choose a smaller preset or a device with more memory"


def _speed(plan: Plan) -> list[str]:
    machine = plan.machine
    least = min(size for size, _ in machine.efficiency)
    text = f"{human_count(plan.tokens_per_second)} tokens/s, at {plan.efficiency:.0%} of the peak ({machine.basis})"
    if machine.name != "cpu" and plan.parameters < least / 4:
        text += f"; that is for {human_count(least)} parameters: with fewer it may be much less"
    return [text]


def _time(plan: Plan) -> list[str]:
    if plan.seconds is None:
        tokens = CHINCHILLA * plan.parameters
        duration = human_duration(tokens / plan.tokens_per_second)
        return [
            f"{duration} for {human_count(tokens)} tokens ({CHINCHILLA} a parameter)",
            "give --tokens or --max-steps, --text 20GB for so much text, or --dataset-path",
        ]
    text = f"{human_duration(plan.seconds)} for {human_count(plan.tokens or 0)} tokens"
    if plan.sessions is None:
        return [text]
    number = f"{plan.sessions} session{'s' if plan.sessions > 1 else ''}"
    return [f"{text}: {number} of {human_duration(plan.session_seconds or 0)}"]


def _disk(plan: Plan) -> list[str]:
    kept = plan.config.max_checkpoints
    text = f"{gb(plan.checkpoint_bytes)} a checkpoint, {gb(plan.run_bytes)} for a run that keeps {kept}, with one being"
    text += " written, best/ and final_model/"
    if plan.disk_bytes is None:
        return [text]
    room = f"of {gb(plan.disk_bytes)}"
    if plan.run_bytes <= plan.disk_bytes:
        return [f"{text}, {room}"]
    number = (plan.disk_bytes - 8 * plan.parameters) // plan.checkpoint_bytes - 1
    if number >= 2:
        return [text, f"TOO MUCH {room}; give --max-checkpoints {number}"]
    return [text, f"TOO MUCH {room} for even 2 checkpoints; choose a smaller preset or another disk"]


def _next(plan: Plan) -> list[str]:
    """Return the command that begins this run, with what has to be changed."""
    if not plan.fits and plan.change is None:
        return []
    config, change = plan.config, {**_own(plan.asked), **(plan.change or {})}
    if plan.machine.name in ("t4", "t4x2"):
        budget = f" --token-budget {human_count(plan.tokens)}" if plan.tokens else ""
        if not change:
            return [f"on Kaggle: ekiden kaggle relay {config.preset} --corpus YOU/CORPUS-1{budget}"]
        lines = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in change.items())
        return [
            f"on Kaggle: ekiden kaggle relay my.yaml --corpus YOU/CORPUS-1{budget}",
            f"where my.yaml says `preset: {config.preset}`, {lines}",
        ]
    devices = f" --devices {plan.machine.count}" if plan.machine.count > 1 else ""
    given = f" {flags(change)}" if change else ""
    return [f"ekiden train {config.preset} --dataset-path SHARDS --output-dir RUN{devices}{given}"]


def _own(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that were given and not the preset's, but for where the run is."""
    preset = vars(build_config(config.preset))
    left_out = ("dataset_path", "output_dir", "device", "devices", "max_steps")
    return {
        name: "auto" if name == "batch_size" and value == AUTO else value
        for name, value in vars(config).items()
        if name not in left_out
        and value != preset[name]
        and isinstance(value, (str, int, float))
        and not (name == "gradient_accumulation_steps" and config.global_batch_size)
    }


def gib(size: float) -> str:
    """Return bytes of memory as GiB or MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


def gb(size: float) -> str:
    """Return bytes on a disk as GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def flags(change: dict[str, Any]) -> str:
    """Return settings as the flags of a command."""
    return " ".join(_flag(name, value) for name, value in change.items())


def _flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    return f"{flag} {value}"
