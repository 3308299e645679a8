"""Packages that a user can do without: named in one sentence where one is missing.

Each belongs to an extra of `pyproject.toml`. Stands beside `errors`, below everything that needs such a package.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ekiden.errors import UserError


def require(package: str, what: str, extra: str | None = None) -> Any:
    """Return the module `package`, imported.

    Args:
        package: name of the module, `a.b` too; the sentence names its first part.
        what: the flag, setting or verb that needs it.
        extra: of Ekiden that installs it. None: it is installed by its own name.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise _missing(name, what, extra, "" if error.name == name else f" ({error})") from None


def check_installed(package: str, what: str, extra: str | None = None) -> None:
    """Refuse to go on without `package`, which is not imported here: some take seconds, or memory for ever.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise _missing(package, what, extra)


def _missing(package: str, what: str, extra: str | None, problem: str = "") -> UserError:
    command = f"pip install '{f'ekiden[{extra}]' if extra else package}'"
    return UserError(f"{what} needs the package {package}{problem}; run `{command}`")
