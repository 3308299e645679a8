"""The verbs of `ekiden checkpoint`: look at the checkpoints of a run, convert them."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ekiden.cli.common import CONTEXT


@click.group(context_settings=CONTEXT)
def checkpoint() -> None:
    """Look at the checkpoints of a run; convert checkpoints."""


@checkpoint.command("list", context_settings=CONTEXT)
@click.argument("run", type=click.Path())
def checkpoint_list(run: str) -> None:
    """Print step, tokens, size, age and state of each checkpoint of RUN; status 1 when none is good.

    RUN may also be one checkpoint.

    Example: ekiden checkpoint list run
    """
    from ekiden.checkpoint.store import format_statuses

    table, good = format_statuses(Path(run))
    click.echo(table)
    sys.exit(0 if good else 1)


checkpoint.add_command(
    click.Command(
        "verify",
        callback=checkpoint_list.callback,
        params=checkpoint_list.params,
        help="The same as `list`: every byte of every checkpoint of RUN is read and compared with its hash.\n\n"
        "Example: ekiden checkpoint verify run",
    )
)


@checkpoint.command("convert", context_settings=CONTEXT)
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--weights-only", is_flag=True, help="Leave out optimizer, schedule and random numbers.")
@click.option("--readable", is_flag=True, help="In JSON, write lists of numbers instead of base64.")
@click.option("--test-load", is_flag=True, help="Read the result back and compare every tensor, bit by bit.")
def checkpoint_convert(source: str, target: str, **options: bool) -> None:
    """Convert the checkpoint SOURCE to TARGET: .json, .pt or .pth, else a folder. Every bit is kept.

    SOURCE is a .pt, .pth or .json file, a .pt that a dataset host unpacked into a folder, a checkpoint of a run, or a
    Hugging Face folder. Nothing in a .pt is run. The memory needed does not grow with the model.

    Example: ekiden checkpoint convert old.pt old.json --test-load
    """
    from ekiden.checkpoint.convert import convert_checkpoint

    click.echo(str(convert_checkpoint(source, target, **options)))
