"""What `generate` and `evaluate` print, on the terminal or, whole or not at all, in the file of `--output`."""

from __future__ import annotations

from pathlib import Path

from ekiden.checkpoint.files import reason, write_atomic
from ekiden.errors import UserError
from ekiden.progress import say


def check_output(output: str | None) -> None:
    """Refuse an output that cannot be written before hours are spent on it.

    Raises:
        UserError: its folder is not there, or it is a folder.
    """
    if output is None:
        return
    if Path(output).is_dir():
        raise UserError(f"--output {output} is a folder; give a file")
    if not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist; create it, or give another file")


def emit(text: str, output: str | None) -> None:
    """Print `text`, or write it to a file, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    if output is None:
        print(text, end="", flush=True)
        return
    try:
        write_atomic(Path(output), text.encode())
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({reason(error)}); give another file") from None
    say(f"written: {output}")
