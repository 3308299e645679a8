"""What a long job shows while it runs: a bar on a terminal, a line every few seconds anywhere else.

Verbs and the training loop send figures here; everything goes to stderr, so that stdout stays a verb's result.
A notebook's or a batch system's log must not explode: a bar redrawn ten times a second over 12 hours is 400,000
lines there, a line every `LINE_SECONDS` is 4,000.
"""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10.0
_silent = False


def silence() -> None:
    """Show nothing more in this process: it trains beside another, which speaks for all."""
    global _silent
    _silent = True


def say(text: str) -> None:
    """Print one line to stderr without breaking a bar that is being drawn."""
    if _silent:
        return
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def human_duration(seconds: float) -> str:
    """Return `seconds` as '45s', '12m05s' or '3h20m'."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def human_count(number: float) -> str:
    """Return `number` as '950', '12.3k', '4.5M' or '1.2B'."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.4g}"


class Progress:
    """Progress of one job of `total` units (None: unknown length).

    Args:
        total: number of units (documents, bytes, steps) in the whole job, including `initial`.
        unit: name of a unit, as shown ('B', 'step').
        label: what the job is, one or two words.
        initial: units done before, by an earlier run.
    """

    def __init__(self, total: int | None, unit: str, label: str, initial: int = 0) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.done, self._initial, self._shown = initial, initial, initial
        self._last_line = time.monotonic()
        self._since: tuple[float, int] | None = None
        self._figures: dict[str, object] = {}
        self._bar: tqdm | None = None
        if sys.stderr.isatty() and not _silent:
            self._bar = tqdm(
                total=total,
                unit=unit,
                desc=label,
                initial=initial,
                unit_scale=unit == "B",
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def update(self, count: int = 1, **figures: object) -> None:
        """Advance by `count` units and show `figures` (name=value, already formatted)."""
        self.done += count
        self._figures.update(figures)
        if self._since is None:  # a first step compiles and fills caches: it says nothing of the others
            self._since = time.monotonic(), self.done
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(self._figures, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._line()

    def _line(self) -> None:
        now = time.monotonic()
        self._last_line, self._shown = now, self.done
        if _silent:
            return
        began, before = self._since or (now, self.done)
        rate = (self.done - before) / (now - began) if now > began else 0.0
        of_total = f"/{human_count(self.total)}" if self.total else ""
        parts = [f"{self.label} {human_count(self.done)}{of_total} {self.unit}"]
        parts += [f"{name} {value}" for name, value in self._figures.items()]
        if self.total and rate > 0:
            parts.append(f"left {human_duration((self.total - self.done) / rate)}")
        print(" | ".join(parts), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Draw the final state."""
        if self._bar is not None:
            self._bar.close()
        elif self.done > self._initial and self.done != self._shown:
            self._line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
