"""`ekiden plan --device` is the plan's own, beside the setting `devices` of a run."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from ekiden.cli import cli


def test_plan_is_made_for_the_device_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("ekiden.planning.plan.plans", lambda config, devices, *_: asked.append(devices) or [])
    result = CliRunner().invoke(cli, ["plan", "gpt2-10m", "--device", "t4", "--device", "cpu"])
    assert result.exit_code == 0 and asked == [("t4", "cpu")]
