"""The verbs that train: `train`, whose flags are the fields of TrainConfig, `plan` and `quickstart`."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from ekiden.cli.common import CONTEXT
from ekiden.config import TrainConfig, build_config, field_help, field_types, preset_names
from ekiden.values import to_int


@click.command(context_settings=CONTEXT)
@click.option("--output-dir", default="quickstart", show_default=True, help="Folder for everything it makes.")
@click.option("--short", is_flag=True, help="A tenth of the steps: shows the path, learns little.")
def quickstart(output_dir: str, short: bool) -> None:
    """The whole path on built-in text, in minutes on a CPU.

    Example: ekiden quickstart --output-dir /tmp/first-run
    """
    from ekiden.quickstart import run_quickstart

    run_quickstart(Path(output_dir), short=short)


def train_options(command: Callable[..., Any], left_out: tuple[str, ...] = ("preset",)) -> Callable[..., Any]:
    """Give `command` one option for every field of TrainConfig but those `left_out`."""
    for name, kind in reversed(field_types().items()):
        if name in left_out:
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


def loading() -> None:
    """Say on a terminal why nothing is seen for some seconds."""
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        click.echo("loading PyTorch", err=True)


class CountType(click.ParamType[int]):
    """A whole number as people write it: 100k, 2M, 1B."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return `value` as an integer, or fail."""
        try:
            return to_int(value)
        except (ValueError, IndexError):
            self.fail(f"{value!r} is not a whole number such as 500k, 20M or 1B", param, ctx)


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
    loading()
    from ekiden.training.loop import train as run

    result = run(config)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one says it
        click.echo(json.dumps(vars(result)))


@click.command(context_settings=CONTEXT)
@click.argument("recipe", required=False)
@click.option(
    "--device",
    "plan_devices",
    multiple=True,
    help="t4, t4x2, p100, l4, a10g, a10gx4, a100, h100 or cpu (this machine's); several give a plan each.  "
    "[default: cpu]",
)
@click.option(
    "--vocab-size", type=int, help="Pieces; without it the tokenizer of --dataset-path counts, else 16,000."
)
@click.option(
    "--tokenizer", default="", help="Tokenizer whose pieces count: a .model file, a folder or a hub id."
)
@click.option(
    "--tokens", type=CountType(), help="Tokens of the whole run, as 1B; without it max_steps counts."
)
@click.option(
    "--text", default="", help="Size of the text instead, as 20GB: a token is taken as 4 bytes of it."
)
@click.option(
    "--disk", default="", help="Room for the run directory, as 100GB.  [default: Kaggle's 20 GB on t4, t4x2]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a plan, one a line.")
@functools.partial(train_options, left_out=("preset", "device"))
def plan(recipe: str | None, **options: Any) -> None:
    """Say what training RECIPE (a preset's name or a YAML file) would need: memory, time, sessions, disk.

    Nothing is trained: memory is found by running the real step on tensors without data. Every setting of `train` may
    be given.

    Example: ekiden plan gemma3-1b --device t4x2 --device a10g --vocab-size 64000 --tokens 1B
    """
    own = {
        name: options.pop(name)
        for name in ("plan_devices", "vocab_size", "tokenizer", "tokens", "text", "disk", "as_json")
    }
    config = build_config(
        recipe, **{name: value for name, value in options.items() if value not in (None, ())}
    )
    from ekiden.planning.plan import plans

    devices = own["plan_devices"] or ("cpu",)
    asked = (own[name] for name in ("vocab_size", "tokens", "disk", "text", "tokenizer"))
    for made in plans(config, devices, *asked):
        click.echo(json.dumps(made.as_dict()) if own["as_json"] else made.text() + "\n")
