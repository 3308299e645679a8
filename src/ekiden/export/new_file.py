"""A single file for somebody else, whole and durable under its name or not there at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ekiden.checkpoint import files
from ekiden.errors import UsageError, UserError


def check_target(target: Path, suffix: str, is_export: Callable[[Path], bool]) -> None:
    """Refuse a name with another ending, a folder, and a file that is not an earlier export.

    Args:
        is_export: whether the file that is there was written by an export of this format.

    Raises:
        UserError: `target` is one of these.
    """
    if target.suffix != suffix:
        raise UsageError(f"--output {target} must end in {suffix}: this format is one file")
    if not os.path.lexists(target):
        return
    if not target.is_file():
        raise UserError(f"--output {target} is not a file; give the name of the file to write")
    if not is_export(target):
        raise UserError(f"--output {target} exists and is not an earlier export; give a new name")


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside `target`; what was written there gets its name when the block ends without error.

    Raises:
        UserError: the disk is full or fails; what was at `target` stays.
    """
    try:
        files.make_folders(target.absolute().parent)
        with files.replacing(target) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(
            f"--output {target} cannot be written ({files.reason(error)}); give another place"
        ) from None
