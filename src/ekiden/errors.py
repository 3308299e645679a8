"""The two kinds of error a user meets.

Every module raises these for a mistake that the user can mend; `cli.main` prints the sentence and exits.
A programmer's mistake stays an `assert` or an ordinary exception, and shows its traceback under `--debug`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One sentence: what is wrong, where (file:line or setting), what to do. Ends the program with status 1."""

    exit_code = 1


class UsageError(UserError):
    """A command, flag or setting that cannot be understood. Ends the program with status 2."""

    exit_code = 2


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the valid word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
