"""The command line: one sentence and status 1 or 2 for a user's mistake, never a traceback."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from ekiden.cli import cli, main
from ekiden.cli import training as training_verbs


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Return (status, stderr) of the command line."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["trane"], 2, "Did you mean 'train'"),
        (["train", "--max-step", "3"], 2, "--max-steps"),
        (["train", "gpt2-1m"], 2, "did you mean 'gpt2-10m'"),
        (["train", "missing.yaml"], 2, "recipe missing.yaml does not exist"),
        (["train", "gpt2-10m"], 1, "--dataset-path"),
        (["train", "gpt2-10m", "--max-steps", "x"], 2, "--max-steps: must be a whole number"),
        (
            ["tokenizer", "train", "/nowhere", "--output", "x.model", "--vocab-size", "9"],
            2,
            "give 300 or more",
        ),
        (
            ["tokenizer", "train", "/nowhere", "--output", "/proc/x/a.model"],
            1,
            "folder /proc/x cannot be written",
        ),
        (["preprocess", "x", "--tokenizer", "x", "--output-dir", "RUN", "--num-proc", "0"], 2, "--num-proc"),
        (["train", "--dataset-path", "/nowhere", "--output-dir", "RUN"], 1, "--dataset-path /nowhere"),
        (["train", "--dataset-path", "RUN", "--output-dir", "RUN", "--device", "cuda:9"], 1, "--device"),
        (["preprocess", "/nowhere", "--tokenizer", "x.model", "--output-dir", "RUN"], 1, "corpus /nowhere"),
        (["tokenizer", "train", "/nowhere", "--output", "x.model"], 1, "corpus /nowhere"),
        (["evaluate", "/nowhere", "--dataset-path", "x"], 1, "/nowhere does not exist"),
        (["generate", "--model-path", "/nowhere", "--prompt", "a"], 1, "/nowhere does not exist"),
        (["generate", "--model-path", "/nowhere"], 2, "--prompt"),
        (["generate", "--model-path", "/nowhere", "--prompt", "a", "--top-p", "3"], 2, "top-p"),
        (["dashboard", "RUN", "--port", "99999"], 2, "99999 is not in the range 0<=x<=65535"),
        (["checkpoint", "list", "/nowhere"], 1, "/nowhere holds no checkpoints"),
    ],
)
def test_a_mistake_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], status: int, words: str
) -> None:
    found, err = run(capsys, *[str(tmp_path) if a == "RUN" else a for a in arguments])
    assert (found, err.startswith("ekiden: ")) == (status, True), err
    assert words in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["checkpoint"]], ids=["ekiden", "a group"])
def test_no_verb_shows_the_verbs(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, shown = run(capsys, *arguments)
    assert status in (0, 2) and "Traceback" not in shown
    assert [line.strip() for line in shown.splitlines()].count("Commands:") == 1


def test_an_unwritable_output_dir_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, err = run(capsys, "train", "--dataset-path", tmp_path, "--output-dir", tmp_path / "file" / "run")
    assert status == 1
    assert "--output-dir" in err


def test_a_defect_is_one_line_and_a_traceback_only_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(training_verbs, "build_config", broken)
    status, err = run(capsys, "train")
    assert status == 1
    assert "KeyError" in err and "Traceback" not in err
    status, err = run(capsys, "--debug", "train")
    assert "Traceback" in err


def commands(command: click.Command, name: str) -> list[tuple[str, click.Command]]:
    """Return every verb with its full name."""
    if isinstance(command, click.Group):
        return [
            pair for key, sub in command.commands.items() for pair in commands(sub, f"{name} {key}".strip())
        ]
    return [(name, command)]


@pytest.mark.parametrize(("name", "command"), commands(cli, ""))
def test_every_verb_has_an_example_and_every_option_a_help(name: str, command: click.Command) -> None:
    assert "Example: ekiden " + name in (command.help or "")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name}"
