"""What a relay has so far: its table of legs with quota and what is left to do, and its files brought home."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from ekiden.checkpoint.manifest import NAME, Damaged, verify_folder
from ekiden.errors import UserError
from ekiden.kaggle.client import Kaggle, KaggleError, Quota
from ekiden.kaggle.state import Attempt, RelayState
from ekiden.progress import human_count, human_duration, say

FOLDERS = ("best", "final_model")
FILES = ("history.jsonl", "training_history.json", "config.yaml", "result.json")


def load_relay(relay_dir: str | Path) -> RelayState:
    """Return the relay in a folder.

    Raises:
        UserError: there is none.
    """
    state = RelayState.load(Path(relay_dir))
    if state is None:
        raise UserError(f"--relay-dir {relay_dir} holds no relay; start one with `ekiden kaggle relay`")
    return state


# -- home -------------------------------------------------------------------------------------------------------------


def pull(relay_dir: str | Path, kaggle: Kaggle, target: str | Path | None = None) -> Path:
    """Bring history, best and final model and the newest checkpoint of a relay home; return the run directory.

    Raises:
        UserError: there is nothing yet, or a file does not arrive as it was.
    """
    state = load_relay(relay_dir)
    if not state.good:
        raise UserError(f"the relay in {relay_dir} has no output yet; look at `ekiden kaggle status`")
    run = Path(target) if target else Path(relay_dir) / "run"
    bring_home(state, kaggle, run)
    return run


def bring_home(state: RelayState, kaggle: Kaggle, run: Path) -> None:
    """Download the newest good output into `run`, each folder whole and verified before it takes its name."""
    good = state.good[-1]
    outputs = kaggle.outputs(good["ref"])
    listed = {name.removeprefix("run/"): url for name, url in outputs.items() if name.startswith("run/")}
    if not listed:
        raise KaggleError(
            f"the output of {good['ref']} is not there any more; see kaggle.com/code/{good['ref']}"
        )
    for folder in [f"checkpoints/{good['name']}", *FOLDERS]:
        if f"{folder}/{NAME}" in listed:
            _fetch_folder(folder, listed, kaggle, run)
    for name in FILES:
        if name in listed:
            kaggle.fetch(listed[name], run / name)
    say(f"{run}: step {good['step']}, {human_count(good['tokens'])} tokens")


def _fetch_folder(folder: str, listed: dict[str, str], kaggle: Kaggle, run: Path) -> None:
    """Download one folder with a manifest; one that is there whole and the same is left alone.

    Raises:
        KaggleError: what came is not what was saved.
    """
    target, half = run / folder, run / f".half-{Path(folder).name}"
    shutil.rmtree(half, ignore_errors=True)
    kaggle.fetch(listed[f"{folder}/{NAME}"], half / NAME)
    with contextlib.suppress(OSError, Damaged):
        if (target / NAME).read_bytes() == (half / NAME).read_bytes():
            verify_folder(target)
            shutil.rmtree(half)
            return
    for name, url in listed.items():
        if name.startswith(f"{folder}/") and re.fullmatch(r"[^/]+", name.removeprefix(f"{folder}/")):
            kaggle.fetch(url, half / Path(name).name)
    try:
        verify_folder(half)
    except Damaged as damage:
        raise KaggleError(
            f"{folder} did not arrive as it was saved: {damage}; run the same command again"
        ) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    half.replace(target)


# -- status -----------------------------------------------------------------------------------------------------------


def quota_now() -> Quota | None:
    """Return this week's quota; None, with the reason said, where Kaggle does not tell it within seconds."""
    try:
        return Kaggle(tries=3).quota()
    except KaggleError as error:
        say(f"this week's quota is not known: {error}")
        return None


def describe(state: RelayState, quota: Quota | None) -> str:
    """Return the table that `ekiden kaggle status` prints: sessions, progress, quota, what is left."""
    rows = [
        f"{'leg':>4} {'session':<26}{'outcome':<14}{'step':>9}{'tokens':>9}{'loss':>9}{'time':>8}  reason"
    ]
    rows += [_row(attempt) for attempt in state.attempts]
    settings, good = state.settings, (state.good[-1] if state.good else None)
    step = good["step"] if good else 0
    of = f" of {settings.max_steps}" if settings.max_steps else ""
    rows.append(f"step {step}{of}, {human_count(good['tokens'] if good else 0)} tokens")
    if state.completed:
        rows.append("complete")
        return "\n".join(rows)
    hours = _hours_a_leg(state.attempts)
    done = [a.verdict["steps_done"] for a in state.attempts if a.verdict.get("steps_done")]
    if settings.max_steps and done and hours:
        sessions = max(1, -(-(settings.max_steps - step) * len(done) // sum(done)))
        rows.append(f"about {sessions} more session(s), {_days(sessions * hours, quota):.1f} days")
    if quota is not None:
        used, allowed = human_duration(quota.used), human_duration(quota.allowed)
        rows.append(f"quota: {used} of {allowed} used, new on {quota.refresh:%Y-%m-%d %H:%M} UTC")
    return "\n".join(rows)


def _row(attempt: Attempt) -> str:
    verdict = attempt.verdict
    loss, tokens = verdict.get("loss"), verdict.get("tokens")
    cells = [
        f"{attempt.leg:>4} {attempt.slug:<26}{attempt.outcome or attempt.state:<14}{verdict.get('step') or '-':>9}",
        f"{human_count(tokens) if tokens else '-':>9}{f'{loss:.4f}' if loss else '-':>9}",
        f"{human_duration(verdict['seconds']) if verdict.get('seconds') else '-':>8}  {attempt.reason}",
    ]
    return "".join(cells).rstrip()


def _hours_a_leg(attempts: Iterable[Attempt]) -> float:
    seconds = [a.verdict["seconds"] for a in attempts if a.verdict.get("steps_done")]
    return sum(seconds) / len(seconds) / 3600 if seconds else 0.0


def _days(hours: float, quota: Quota | None) -> float:
    """Return the days in which so many GPU hours can be had: each after the other, no more a week than the quota."""
    if quota is None or quota.allowed <= 0:
        return hours / 24
    left, weekly = quota.left / 3600, quota.allowed / 3600
    if hours <= left:
        return hours / 24
    weeks = math.ceil((hours - left) / weekly) - 1
    rest = hours - left - weeks * weekly
    until = max(0.0, (quota.refresh.timestamp() - time.time()) / 86_400)
    return until + 7 * weeks + rest / 24
