"""A package that is missing: one sentence, with an extra that there is."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ekiden.errors import UserError
from ekiden.optional import check_installed, require
from ekiden.training.trackers.base import TRACKERS

ROOT = Path(__file__).parents[1]


def named_extras(path: Path) -> Iterator[str]:
    """Yield the extras that a file's sentences, and its calls of `optional`, name."""
    text = path.read_text(encoding="utf-8")
    for names in re.findall(r"ekiden\[([\w,]+)\]", text):
        yield from names.split(",")
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("require", "check_installed"):
                for keyword in node.keywords:
                    values = ast.walk(keyword.value) if keyword.arg == "extra" else ()
                    yield from (v.value for v in values if isinstance(v, ast.Constant) and v.value != "s3fs")


def test_every_extra_that_a_sentence_names_exists() -> None:
    there = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    pages = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    named = {(extra, path.name) for path in pages for extra in named_extras(path) if extra}
    assert {"bnb", "dask", "dedupe", "gguf", "harness", "report", "s3"} <= {extra for extra, _ in named}
    assert not [pair for pair in named if pair[0] not in there]
    assert TRACKERS.keys() <= there  # --trackers NAME names the extra of that name


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = r"--x needs the package nowhere; run `pip install 'ekiden\[gguf\]'`$"
    with pytest.raises(UserError, match=expected):
        require("nowhere.inside", "--x", extra="gguf")
    with pytest.raises(UserError, match=expected):
        check_installed("nowhere", "--x", extra="gguf")
    with pytest.raises(UserError, match=r"run `pip install 'nowhere'`$"):
        check_installed("nowhere", "--x")
    monkeypatch.setitem(sys.modules, "json", None)
    with pytest.raises(UserError, match=r"--x needs the package json; run"):
        require("json", "--x")


def test_a_broken_package_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_here.py").write_text("import not_there_either\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"package broken_here \(No module named 'not_there_either'\); run"):
        require("broken_here", "--x")
