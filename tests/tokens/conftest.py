"""Fixtures of the token tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def sentences(language_folder: Path) -> list[str]:
    """Return the texts of the small corpus."""
    return [
        json.loads(line)["text"]
        for file in sorted(language_folder.rglob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
