"""A plan in words, for somebody who decides what to do next: short lines, each under its label."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Any

from ekiden.config import TrainConfig, build_config
from ekiden.config_checks import AUTO
from ekiden.planning.devices import GIB
from ekiden.planning.trace import Peak
from ekiden.progress import human_count, human_duration
from ekiden.training.recipe import describe_recipe
from ekiden.values import to_int

if TYPE_CHECKING:
    from ekiden.planning.plan import Plan

WIDTH = 100
LABEL = 10
HARD = "\N{NO-BREAK SPACE}"
_TOGETHER = re.compile(
    r"(\d[\d.,]*[kMB]?(?= (?:GiB|MiB|GB|MB|days|tokens|sessions?|parameters|a parameter)\b)|--[a-z0-9-]+(?= [^-\s])|\d x(?= )) "
)
"""What stands before a space at which no line may end."""
CHINCHILLA = 20
"""Tokens a parameter that a training run of given cost should see (Hoffmann et al. 2022, arXiv:2203.15556)."""


ESTIMATED = "FSDP cannot be traced with this PyTorch; this is a whole step with what lasts divided"
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
                f"{config.max_length} tokens{_with(plan)}",
                _parts(peak),
                *([f"ESTIMATED: {ESTIMATED} ({peak.estimated})"] if peak.estimated else []),
                *_verdict(plan),
                *([_SHARDED] if plan.sharded else []),
            ],
        ),
        ("speed", _speed(plan)),
        ("time", _time(plan)),
        ("disk", _disk(plan)),
    ]
    for label, texts in sections:
        for number, text in enumerate(texts):
            lines += _wrapped("" if number else label, text)
    for number, text in enumerate(_next(plan)):
        is_command = text.startswith("ekiden")
        lines += _wrapped("" if number else "next", text, " \\" if is_command else "")
    return "\n".join([*lines, *(describe_recipe(config) if plan.says_recipe else [])])


def _wrapped(label: str, text: str, ending: str = "") -> list[str]:
    """Return `text` in lines; a number and its unit, a flag and its value stay together. `ending`: of all lines but the last."""
    first, later = f"  {label:<{LABEL - 2}}", " " * LABEL
    lines = textwrap.wrap(
        _TOGETHER.sub(f"\\1{HARD}", text),
        WIDTH - len(ending),
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines = [line.replace(HARD, " ") for line in lines]
    return [*(line + ending for line in lines[:-1]), lines[-1]]


def _parts(peak: Peak) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in peak.parts.items() if size >= GIB // 200)


def _with(plan: Plan) -> str:
    """Return the settings that were tried where none fits and the microbatch is automatic."""
    asked = plan.asked
    names = ("activation_checkpointing", "optimizer_moments", "cpu_offload")
    tried = {name: getattr(plan.config, name) for name in names}
    tried = {name: value for name, value in tried.items() if value != getattr(asked, name)}
    return f" and {flags(tried)}" if tried else ""


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
    tokens = f"{plan.microbatch} x {plan.config.max_length} tokens"
    return [
        f"DOES NOT FIT: {usable}; it fits with",
        flags(plan.change),
        f"({gib(plan.changed_peak.total)}{host} with {tokens}; same global batch)",
    ]


def _way_out(plan: Plan) -> str:
    """Return what helps where no setting does: not a shorter window where the weights alone are too much."""
    standing = sum(plan.peak.parts[name] for name in ("weights", "gradients"))
    if standing > plan.machine.usable_bytes:
        return "choose a smaller preset or --vocab-size, or a device with more memory"
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
        return [
            f"{duration(tokens / plan.tokens_per_second)} for {human_count(tokens)} tokens ({CHINCHILLA} a parameter)",
            "give --tokens or --max-steps, --text 20GB for so much text, or --dataset-path",
        ]
    text = f"{duration(plan.seconds)} for {human_count(plan.tokens or 0)} tokens"
    if plan.sessions is None:
        return [text]
    number = f"{plan.sessions} session{'s' if plan.sessions > 1 else ''}"
    return [f"{text}: {number} of {human_duration(plan.session_seconds or 0)}"]


def duration(seconds: float) -> str:
    """Return a time as '3h20m', from three days on as '12 days'; no estimate is good to the second."""
    if seconds < 60:
        return "under a minute"
    days = seconds / 86400
    return f"{days:,.0f} days" if days >= 3 else human_duration(seconds)


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
    least = gb(3 * plan.checkpoint_bytes + 8 * plan.parameters)
    return [text, f"TOO MUCH {room}: --max-checkpoints 2, the fewest, takes {least}; {_more_disk(plan)}"]


def _more_disk(plan: Plan) -> str:
    """Return what helps where even two checkpoints are too many; a mirror does not, which copies what stays here."""
    eight_bit = 3 * 6 * plan.parameters + 8 * plan.parameters
    compact = plan.config.optimizer == "adamw" and not plan.sharded
    if compact and plan.config.optimizer_moments != "8bit" and eight_bit <= (plan.disk_bytes or 0):
        return f"with --optimizer-moments 8bit it takes {gb(eight_bit)}, or have a larger disk"
    return (
        "choose a smaller preset or have a larger disk (--mirror copies checkpoints, and leaves these here)"
    )


def _next(plan: Plan) -> list[str]:
    """Return the command that begins this run, with what has to be changed, and what goes with it."""
    command = next_command(plan)
    if command is None:
        return []
    change = changes(plan)
    if plan.machine.name not in ("t4", "t4x2") or not change:
        return [command]
    lines = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in change.items())
    return [command, f"where my.yaml says `preset: {plan.config.preset}`, {lines}"]


def next_command(plan: Plan) -> str | None:
    """Return the command that begins this run; None where nothing makes it fit."""
    if not plan.fits and plan.change is None:
        return None
    config, change = plan.config, changes(plan)
    if plan.machine.name in ("t4", "t4x2"):  # Kaggle's
        budget = f" --token-budget {_exact(plan.tokens)}" if plan.tokens else ""
        recipe = "my.yaml" if change else config.preset
        return f"ekiden kaggle relay {recipe} --corpus YOU/CORPUS-1{budget}"
    devices = f" --devices {plan.machine.count}" if plan.machine.count > 1 else ""
    steps = f" --max-steps {plan.asked.max_steps}" if plan.asked.max_steps else ""
    given = f" {flags(change)}" if change else ""
    places = f"--dataset-path {config.dataset_path or 'SHARDS'} --output-dir {config.output_dir or 'RUN'}"
    return f"ekiden train {config.preset} {places}{devices}{steps}{given}"


def _exact(number: int) -> str:
    """Return a number as people write it, where that is the same number."""
    short = human_count(number)
    return short if to_int(short) == number else str(number)


def changes(plan: Plan) -> dict[str, Any]:
    """Return what the run sets beside its preset: what was given, and what makes it fit."""
    change = {**_own(plan.asked), **(plan.change or {})}
    if plan.sharded and plan.asked.batch_size == AUTO:  # which needs a number there
        change["batch_size"] = plan.microbatch
    return change


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
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


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
