"""The history, sent on to Weights & Biases, TensorBoard or trackio where the user asks for it.

A tracker is two methods (`base.Tracker`); `follow.Follower` drives one from a thread of its own that reads
`history.jsonl` as it grows, so that nothing a tracker does, or fails to do, can stop a step.
"""

from __future__ import annotations

from ekiden.training.trackers.base import Tracker
from ekiden.training.trackers.follow import Follower, Trackers

__all__ = ["Follower", "Tracker", "Trackers"]
