"""The process that the suite's short campaigns run in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import warm
from forked import Served

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def short_campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Rows]]:
    """Yield a function that has `warm` do a task, and returns its rows."""
    folder = tmp_path_factory.mktemp("warm")
    process = Served(warm.begin, folder / "log", folder)
    yield lambda **task: process.ask(task)
    process.close()
