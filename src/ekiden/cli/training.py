"""The verbs that train: `train`, whose flags are the fields of TrainConfig, and `quickstart`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from ekiden.cli.common import CONTEXT
from ekiden.config import TrainConfig, build_config, field_help, field_types, preset_names


@click.command(context_settings=CONTEXT)
@click.option("--output-dir", default="quickstart", show_default=True, help="Folder for everything it makes.")
@click.option("--short", is_flag=True, help="A tenth of the steps: shows the path, learns little.")
def quickstart(output_dir: str, short: bool) -> None:
    """The whole path on built-in text, in minutes on a CPU.

    Example: ekiden quickstart --output-dir /tmp/first-run
    """
    from ekiden.quickstart import run_quickstart

    run_quickstart(Path(output_dir), short=short)


def train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` one option for every field of TrainConfig."""
    for name, kind in reversed(field_types().items()):
        if name == "preset":
            continue
        default = getattr(TrainConfig(), name)
        shown = f" [default: {default}]" if default not in ("", [], {}) else ""
        flag = "--" + name.replace("_", "-")
        settings: dict[str, Any] = {"default": None, "help": field_help()[name] + shown}
        if kind is bool:
            flag += "/--no-" + name.replace("_", "-")
        elif get_origin(kind) is list:
            settings |= {"multiple": True, "metavar": "TEXT"}
        else:
            settings["metavar"] = "|".join(get_args(kind)) if get_origin(kind) is Literal else metavar(kind)
        command = click.option(flag, name, **settings)(command)
    return command


def metavar(kind: Any) -> str:
    """Return how a value of type `kind` is shown in help."""
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(kind, "NAME=SHARE,...")


@click.command(context_settings=CONTEXT)
@click.argument("recipe", required=False)
@click.option("--list-presets", is_flag=True, help="Print the presets and exit.")
@train_options
def train(recipe: str | None, list_presets: bool, **settings: Any) -> None:
    """Train RECIPE (a preset's name or a YAML file); run it again to resume.

    Defaults shown are the program's; a preset or recipe sets its own.

    Example: ekiden train gpt2-10m --dataset-path shards --output-dir run --max-steps 5000 --max-time 11h30m
    """
    if list_presets:
        click.echo("\n".join(preset_names()))
        return
    config = build_config(
        recipe, **{name: value for name, value in settings.items() if value not in (None, ())}
    )
    from ekiden.training.loop import train as run

    click.echo(json.dumps(vars(run(config))))
