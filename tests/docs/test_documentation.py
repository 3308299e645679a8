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
TINY = (
    "--max-steps 4 --eval-steps 2 --save-steps 2 --batch-size 2 --gradient-accumulation-steps 1 --max-length 32 "
    "--hidden-size 32 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads {heads} --head-dim 16 "
    "--intermediate-size 32 --sample-tokens 4 --eval-tokens 200 --compile off --num-threads 1 --device cpu"
)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return (language, text, why it is not run or "") of each fenced block of a page.

    Read line by line: a fence closes what the one before it opened, whatever language that named.
    """
    found, language, lines, why = [], None, [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if language is not None and line.rstrip() == "```":
            found.append((language, "\n".join(lines), why))
            language, why = None, ""
        elif language is not None:
            lines.append(line)
        elif line.startswith("```"):
            language, lines = line[3:].strip(), []
        elif line.strip():
            mark = re.fullmatch(r"<!-- not run: (.+) -->", line.strip())
            why = mark[1] if mark else ""
    assert language is None, f"{page.name}: a block is not closed"
    return found


def commands(page: Path) -> list[tuple[str, str]]:
    """Return the `ekiden` commands of a page, and why each cannot be run anywhere, or ""."""
    found = []
    for language, text, why in blocks(page):
        if language in ("", "bash", "sh", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                if (line := line.strip().removeprefix("$ ")).startswith("ekiden "):
                    found.append((re.sub(r"\s+#\s.*", "", line), why))
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
    assert sum(len(commands(page)) for page in PAGES) > 60


def test_a_block_after_one_in_another_language_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx\n```\n\n```\nekiden a\n```\n<!-- not run: a reason -->\n```sh\nekiden b\n```\n"
    )
    assert commands(page) == [("ekiden a", ""), ("ekiden b", "a reason")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_escapes(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"^(?: {4,}|\t)(?:\$ )?(?:ekiden|make|python) .*", text, re.M), "give it a fence"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    code = re.findall(r"`([^`\n]+)`", text) + [
        line for _, block, _ in blocks(page) for line in block.splitlines()
    ]
    for command in code:
        if match := re.match(r"make ([a-z-]+)$", command):
            assert match[1] in targets, command
        if match := re.match(r"(?:\.venv/bin/)?python ((?:benchmarks|tests|docs)/\S+\.py)(.*)", command):
            script = ROOT / match[1]
            assert script.is_file(), command
            source = "".join(path.read_text(encoding="utf-8") for path in script.parent.glob("*.py"))
            assert [flag for flag in re.findall(r"--[a-z-]+", match[2]) if flag not in source] == [], command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_is_python(page: Path) -> None:
    for language, text, _ in blocks(page):
        if language == "python":
            compile(text, str(page), "exec")


def test_every_symptom_is_a_message_of_the_program() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = re.findall(r"^\| `(.+?)` \|", page, re.M)
    code = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
        for path in Path(ekiden.__file__).parent.rglob("*.py")
    )
    assert len(symptoms) > 10
    assert [symptom for symptom in symptoms if symptom not in code] == []


PATHS = [page for page in PAGES if any(not why for _, why in commands(page))]
BEGINS_WITH_A_CORPUS = ("README", "quickstart", "laptop", "wikitext", "a10g", "first-walk")
"""Pages, and all of tutorials/, that make their own tokenizer and shards; the others find a run that is there."""


def run_page(page: Path, folder: Path, only: int | None = None) -> int:
    """Run the commands of a page one after another with tiny settings; return how many ran.

    What the pages say to have stands in `folder`: a corpus, and for how-to pages shards and a run.
    """
    corpus = folder / "corpus"
    shutil.copytree(Path(ekiden.__file__).parent / "sample_corpus", corpus)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    prepared: list[str] = []
    (folder / "prompts.txt").write_text("The river\nDe rivier\n", encoding="utf-8")
    (folder / "prompts.jsonl").write_text('{"prompt": "The river"}\n', encoding="utf-8")
    (folder / "my.yaml").write_text("preset: gpt2-10m\nmax_steps: 20\n", encoding="utf-8")
    if page.stem not in BEGINS_WITH_A_CORPUS and page.parent.name != "tutorials":
        prepared = [
            "ekiden tokenizer train corpus --output my.model --vocab-size 700",
            "ekiden preprocess corpus --tokenizer my.model --output-dir shards --test-split 0.2",
        ]
        prepared.append("ekiden train gpt2-10m --dataset-path shards --output-dir run")
    count = 0
    wanted = [command for command, why in commands(page) if not why and "quickstart" not in command]
    for command in [*prepared, *wanted[:only]]:
        if "run-a" in command:
            for name in ("run-a", "run-b"):
                shutil.copytree(folder / "run", folder / name, dirs_exist_ok=True)
        words = []
        for word in shlex.split(tiny(command)):  # what a shell does with a *
            words += (
                sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else [word]
            )
        result = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if "needs the package" in result.stderr:
            pytest.skip(f"{page.name}: {result.stderr.strip().splitlines()[-1]}")
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
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", PATHS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    assert run_page(page, tmp_path) >= 1


def test_the_quick_start_on_own_text_begins(tmp_path: Path) -> None:
    assert run_page(ROOT / "docs" / "quickstart.md", tmp_path, only=2) == 2
