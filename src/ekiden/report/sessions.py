"""The sessions of a run, out of the events of its history: when, on what, with what, and how each ended.

A session begins with a start or resume event. One that was killed has no stop event: it ends with its last record, or
where the next one begins.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ekiden.errors import UserError
from ekiden.tokens.mixture import BLOCK, Mixture

MARKS = {
    "oom": "out of memory",
    "skip": "step skipped",
    "rollback": "roll-back",
    "save-failed": "save failed",
    "resume-verified": "resume verified",
}
"""Events shown as a mark, beside the beginnings of sessions."""
SHOWN_MARKS = 500
"""Marks kept at most: a run that skips every step should not make a page of 100,000."""


class Sessions:
    """Sessions, marks and mixture of a run, event by event."""

    def __init__(self) -> None:
        self.sessions: list[dict[str, Any]] = []
        self.marks: list[dict[str, Any]] = []
        self.model: dict[str, Any] = {}
        self.max_steps: int | None = None
        self._mixture: dict[str, Any] | None = None
        self._global_batch = 0
        self._left_out: list[tuple[int, int]] = []
        self._flops: float | None = None

    def event(self, record: dict[str, Any]) -> None:
        """Take one event of the history."""
        event, step = record["event"], record["step"]
        if event in ("start", "resume"):
            self._begin(record)
        elif event in ("time", "stop") and self.sessions:
            self.sessions[-1]["seconds"] = record.get("seconds", self.sessions[-1]["seconds"])
            if event == "stop":
                self.sessions[-1] |= {"status": record.get("status"), "reason": record.get("reason")}
        if event == "rollback":
            self._left_out.append((record["first_bad_step"] - 1, record["batches_left_out"]))
        if event in MARKS and len(self.marks) < SHOWN_MARKS:
            self.marks.append({"step": step, "kind": event, "text": describe_mark(record)})

    def _begin(self, record: dict[str, Any]) -> None:
        if self.sessions:
            previous = self.sessions[-1]
            if previous["status"] is None:
                previous |= {"status": "killed", "reason": "ended without a word"}
            ended, gap = previous["ended"], record["time"] - previous["ended"]
            text = (
                f"session {len(self.sessions)} ended at step {previous['last_step']} ({previous['reason']})"
            )
            if ended and gap > 0:
                text += f"; the next one began {gap:.0f} s later, from step {record['step']}"
            self.marks.append({"step": record["step"], "kind": "interruption", "text": text})
        self.sessions.append(
            {
                "first_step": record["step"],
                "last_step": record["step"],
                "began": record["time"],
                "ended": record["time"],
                "status": None,
                "reason": None,
                "seconds": {},
                "level": record.get("level"),
                "differing": record.get("differing", []),
                "changed": record.get("changed", {}),
                "environment": record.get("environment", {}),
                "hardware": record.get("hardware", {}),
                "versions": record.get("versions", {}),
            }
        )
        self.max_steps = record.get("max_steps", self.max_steps)
        self.model = record.get("model", self.model)
        self._mixture = record.get("mixture", self._mixture)
        self._global_batch = record.get("global_batch", self._global_batch)
        peak, flops = self.model.get("peak_flops"), self.model.get("flops_per_token")
        self._flops = (
            flops / (peak * record.get("hardware", {}).get("processes", 1)) if peak and flops else None
        )

    def seen(self, record: dict[str, Any]) -> None:
        """Let the session that is open reach as far as `record`."""
        if self.sessions:
            session = self.sessions[-1]
            session["last_step"] = max(session["last_step"], record["step"])
            session["ended"] = max(session["ended"], record.get("time", 0.0))

    def open_session(self) -> bool:
        """Return whether the last session has not said that it stopped."""
        return bool(self.sessions) and self.sessions[-1]["status"] is None

    def mfu(self, tokens_per_second: float) -> float:
        """Return the share of the devices' peak that the open session uses at this speed; NaN where unknown."""
        return tokens_per_second * self._flops if self._flops else math.nan

    def rows(self) -> list[dict[str, Any]]:
        """Return the sessions; the last one's steps overlap the next one's first, where they were done again."""
        return self.sessions

    def mixture_rows(self, step: int) -> list[dict[str, Any]]:
        """Return {"language", "tokens", "planned", "seen", "epochs"} a language: shares of the samples up to `step`."""
        if self._mixture is None or not self._global_batch:
            return []
        try:
            mixture = Mixture.from_dict(self._mixture)
        except UserError:
            return []
        seen = self._seen(mixture, step)
        total = max(1, int(seen.sum()))
        return [
            {
                "language": name,
                "tokens": tokens,
                "planned": share,
                "seen": count / total,
                "epochs": count * mixture.length / tokens,
            }
            for (name, share), tokens, count in zip(mixture.shares().items(), mixture.tokens, seen.tolist())
        ]

    def _seen(self, mixture: Mixture, step: int) -> np.ndarray:
        """Return the samples of each language in the first `step` steps; batches left out do not count."""
        batches, counts = step, np.zeros(len(mixture.languages), dtype=np.int64)
        for first, count in sorted(self._left_out):
            if first < step:
                counts -= count_samples(
                    mixture, first * self._global_batch, (first + count) * self._global_batch
                )
                batches += count
        return counts + count_samples(mixture, 0, batches * self._global_batch)


def count_samples(mixture: Mixture, first: int, end: int) -> np.ndarray:
    """Return how many of the samples from `first` to before `end` are of each language; O(a block)."""
    return _count_up_to(mixture, end) - _count_up_to(mixture, first)


def _count_up_to(mixture: Mixture, end: int) -> np.ndarray:
    whole = np.array(mixture.quotas, dtype=np.int64) * (end // BLOCK)
    rest = np.arange(end // BLOCK * BLOCK, end)
    if len(rest):
        whole += np.bincount(mixture.locate(rest)[0], minlength=len(mixture.languages))
    return whole


def describe_mark(record: dict[str, Any]) -> str:
    """Return one line about an event, for a mark."""
    step, details = record["step"], ""
    if record["event"] == "oom" and "microbatch" in record:
        details = f": microbatch {record['microbatch'][0]} to {record['microbatch'][1]}"
    elif record["event"] == "skip":
        details = f": loss {record.get('loss')}"
    elif record["event"] == "rollback":
        details = (
            f": {record.get('batches_left_out')} batches from step {record.get('first_bad_step')} left out"
        )
    elif record["event"] == "save-failed":
        details = f": {record.get('problem')}"
    elif record["event"] == "resume-verified":
        details = ": bit-exact" if record.get("bit_exact") else ": not bit-identical"
    return f"{MARKS[record['event']]} at step {step}{details}"
