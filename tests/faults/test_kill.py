"""A short, seeded part of the kill campaign: both families, some SIGKILLs, bit-identical to the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from campaign import whole
from warm import KILLS


@pytest.mark.parametrize("preset", ["gpt2-10m", "gemma3-tiny"])
def test_killed_runs_end_bit_identical(
    preset: str, short_campaign: Callable[..., list[dict[str, Any]]]
) -> None:
    rows = short_campaign(kills=preset)
    assert sum(row["tries"] for row in rows) == KILLS
    assert all(whole(row) for row in rows), rows
