"""Every command in the documentation parses, and the main pages' commands run; every message in it is the program's."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import ekiden
from ekiden.cli import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])
PAGES = [page for page in PAGES if "reference" not in page.parts and "_build" not in page.parts]
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?^```(?:bash|sh|console)?\n(.*?)^```$", re.M | re.S)
TINY = (
    "--max-steps 4 --eval-steps 2 --save-steps 2 --batch-size 2 --gradient-accumulation-steps 1 --max-length 32 "
    "--hidden-size 32 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads {heads} --head-dim 16 "
    "--intermediate-size 32 --sample-tokens 4 --eval-tokens 200 --compile off --num-threads 1 --device cpu"
)


def commands(page: Path) -> list[tuple[str, bool]]:
    """Return the `ekiden` commands of a page, and whether each can be run anywhere."""
    found = []
    for marked, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().removeprefix("$ ").startswith("ekiden "):
                found.append((re.sub(r"\s+#\s.*", "", line.strip().removeprefix("$ ")), not marked))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page: Path) -> None:
    for command, _ in commands(page):
        words = [word for word in shlex.split(command)[1:] if word not in ("...", "--debug")]
        node: click.Command = cli
        context = click.Context(cli)
        while isinstance(node, click.Group):
            name, node, words = node.resolve_command(context, words)  # type: ignore[assignment]
        try:
            node.make_context(str(name), words, parent=context)
        except click.exceptions.Exit:
            pass  # --help
        except click.UsageError as problem:
            if "does not exist" in problem.format_message():
                continue  # a folder of the reader's
            pytest.fail(f"{page.name}: {command}: {problem.format_message()}")


def test_pages_hold_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 25


def test_every_symptom_is_a_message_of_the_program() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = re.findall(r"^\| `(.+?)` \|", page, re.M)
    code = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
        for path in Path(ekiden.__file__).parent.rglob("*.py")
    )
    assert len(symptoms) > 10
    assert [symptom for symptom in symptoms if symptom not in code] == []


MAIN_PAGES = (
    "quickstart",
    "tutorials/laptop",
    "tutorials/wikitext",
    "tutorials/kaggle",
    "tutorials/a10g",
    "howto",
    "reports",
)


def run_page(page: Path, folder: Path, only: int | None = None) -> int:
    """Run the commands of a page one after another with tiny settings; return how many ran.

    What the pages say to have stands in `folder`: a corpus, and for how-to pages shards and a run.
    """
    corpus = folder / "corpus"
    shutil.copytree(Path(ekiden.__file__).parent / "sample_corpus", corpus)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    prepared: list[str] = []
    if page.stem in ("howto", "reports"):
        prepared = [
            "ekiden tokenizer train corpus --output my.model --vocab-size 700",
            "ekiden preprocess corpus --tokenizer my.model --output-dir shards --test-split 0.2",
        ]
        prepared.append("ekiden train gpt2-10m --dataset-path shards --output-dir run")
    count = 0
    wanted = [command for command, runs in commands(page) if runs and "quickstart" not in command]
    for command in [*prepared, *wanted[:only]]:
        words = shlex.split(tiny(command))
        result = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{page.name}: {command}\n{result.stderr[-2000:]}"
        count += 1
    return count


def tiny(command: str) -> str:
    """Return a command with settings that take seconds."""
    command = (
        re.sub(r"--vocab-size \d+", "--vocab-size 700", command) if "tokenizer train" in command else command
    )
    command = re.sub(r"step-0000\d+", "step-00000004", command)
    if command.startswith("ekiden preprocess"):
        return re.sub(r"--test-split \S+", "", command) + " --test-split 0.2 --num-proc 1"
    if command.startswith("ekiden train"):
        flags = TINY.format(heads=2 if "gpt2" in command else 1)
        return (
            re.sub(r"--(max-steps|eval-steps|save-steps|epochs|max-epochs-per-language) \S+", "", command)
            + " "
            + flags
        )
    if command.startswith("ekiden generate"):
        return command + " --max-new-tokens 4 --device cpu"
    return command


@pytest.mark.slow
@pytest.mark.parametrize("name", MAIN_PAGES)
def test_the_commands_of_the_main_pages_run(name: str, tmp_path: Path) -> None:
    assert run_page(ROOT / "docs" / f"{name}.md", tmp_path) >= 3


def test_the_quick_start_on_own_text_begins(tmp_path: Path) -> None:
    assert run_page(ROOT / "docs" / "quickstart.md", tmp_path, only=2) == 2
