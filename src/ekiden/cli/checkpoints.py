"""The verbs of `ekiden checkpoint`: look at the checkpoints of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ekiden.cli.common import CONTEXT


@click.group(context_settings=CONTEXT)
def checkpoint() -> None:
    """Look at the checkpoints of a run."""


@checkpoint.command("list", context_settings=CONTEXT)
@click.argument("run", type=click.Path())
def checkpoint_list(run: str) -> None:
    """Print step, tokens, size, age and state of each checkpoint of RUN; status 1 when none is good.

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
