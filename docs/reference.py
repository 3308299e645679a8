"""Reference pages out of the code: every setting, every verb, the files of a run. Called by `conf.py` at each build."""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from ekiden.checkpoint import manifest
from ekiden.cli import cli
from ekiden.config import RESUME_FREE, TrainConfig, field_help, load_preset, preset_names
from ekiden.training import history, rundir, state


def write_reference(folder: Path) -> None:
    """Write settings.md, verbs.md and files.md into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, text in (("settings", settings()), ("verbs", verbs()), ("files", files())):
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def settings() -> str:
    """Return the page of all settings, with their defaults and what each preset says."""
    lines = [
        "# Settings",
        "",
        "The field is the flag is the YAML key: `max_steps`, `--max-steps`, `max_steps:`.",
        "",
    ]
    presets = {name: load_preset(name) for name in preset_names()}
    for name, text in field_help().items():
        default = getattr(TrainConfig(), name)
        lines += [f"## `{name}`", "", text, ""]
        lines.append(
            f"Default: `{default!r}`. " + ("May" if name in RESUME_FREE else "May not") + " change on resume."
        )
        set_by = [f"{preset}: `{values[name]!r}`" for preset, values in presets.items() if name in values]
        lines += ["", f"Presets: {', '.join(set_by)}.", ""] if set_by and name != "preset" else [""]
    return "\n".join(lines)


def verbs() -> str:
    """Return the help of every verb."""
    lines = ["# Verbs", ""]
    for path, command in walk(cli, "ekiden"):
        context = click.Context(command, info_name=path, max_content_width=100)
        lines += [f"## `{path}`", "", "```", command.get_help(context), "```", ""]
    return "\n".join(lines)


def walk(command: click.Command, path: str) -> list[tuple[str, click.Command]]:
    """Return a command and those below it, with what a user types for them."""
    found = [(path, command)]
    if isinstance(command, click.Group):
        for name, below in sorted(command.commands.items()):
            found += walk(below, f"{path} {name}")
    return found


def files() -> str:
    """Return what the modules that own a run's files say about them."""
    lines = ["# Files of a run", ""]
    for module in (rundir, history, manifest, state):
        lines += [f"## `{module.__name__}`", "", str(module.__doc__).strip(), ""]
    return "\n".join(lines)
