"""The verbs: parse, call one function, print. No logic.

Results go to stdout, progress and messages to stderr. A user's mistake is one sentence and status 1 or 2; the
traceback of a defect is shown with `ekiden --debug VERB ...`.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback

import click

from ekiden import __version__
from ekiden.cli import checkpoints, data, kaggle, models, reports, training
from ekiden.cli.common import CONTEXT
from ekiden.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        cli.main([a for a in arguments if a != "--debug"], prog_name="ekiden", standalone_mode=False)
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # click has it since 8.2; its message is the help
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        fail(error.format_message(), 2)
    except click.Abort:
        fail("interrupted", 130)
    except UserError as error:
        if debug:
            traceback.print_exc()
        if getattr(error, "quiet", False):  # another rank says it
            sys.exit(error.exit_code)
        fail(str(error), error.exit_code)
    except BrokenPipeError:
        os._exit(0)
    except Exception as error:
        if debug:
            traceback.print_exc()
        fail(describe_defect(error), 1)


def describe_defect(error: Exception) -> str:
    """Return one sentence for an exception that no module turned into a user's error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror.lower()}"
    return f"{type(error).__name__}: {error} (a defect; `ekiden --debug` before the verb shows where)"


def fail(sentence: str, status: int) -> None:
    """Print `sentence` to stderr and exit."""
    click.echo(f"ekiden: {' '.join(sentence.split())}", err=True)
    sys.exit(status)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="ekiden")
def cli() -> None:
    """Pretrain language models from scratch, in any language, on machines that will be taken away.

    After an interruption, run the same command again. `ekiden --debug VERB ...` shows tracebacks.
    """


for command in (
    training.quickstart,
    data.tokenizer,
    data.preprocess,
    data.corpus,
    training.plan,
    training.train,
    models.evaluate,
    models.generate,
    models.export,
    checkpoints.checkpoint,
    reports.report,
    reports.dashboard,
    kaggle.kaggle,
):
    cli.add_command(command)
