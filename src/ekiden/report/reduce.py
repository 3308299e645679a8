"""Long curves made short: every extreme stays, so that no spike is lost on a screen.

The page of a run of 100,000 records has to open on a phone; `reading` sends each curve through here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

POINTS = 2000
"""Points of a curve at most: twice as many as a phone's screen has columns."""


def reduce_curve(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[list, list]:
    """Return about `points` points of a curve, as JSON values: in each of points / 2 pieces the lowest and the highest.

    The first and the last point stay. A value that is not finite becomes None, which plots leave a gap for; a piece
    that holds such values keeps one of them as well.
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(xs) > points:
        kept = _extremes(ys, points)
        xs, ys = xs[kept], ys[kept]
    return [_number(value) for value in xs.tolist()], [_number(value) for value in ys.tolist()]


def _extremes(ys: np.ndarray, points: int) -> np.ndarray:
    """Return the sorted positions of the first, the last, and each piece's lowest and highest value."""
    pieces = max(1, points // 2 - 1)
    edges = np.linspace(0, len(ys), pieces + 1).astype(np.int64)
    kept = {0, len(ys) - 1}
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist()):
        piece = ys[start:end]
        finite = np.flatnonzero(np.isfinite(piece))
        if len(finite) < len(piece):
            kept.add(start + int(np.flatnonzero(~np.isfinite(piece))[0]))
        if len(finite):
            inside = piece[finite]
            kept.add(start + int(finite[inside.argmin()]))
            kept.add(start + int(finite[inside.argmax()]))
    return np.array(sorted(kept))


def _number(value: float) -> float | int | None:
    """Return a value with 6 digits, short in JSON."""
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.6g}")
