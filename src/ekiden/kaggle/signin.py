"""Signing in to Kaggle by the official client's own ways, with requests that end; and the errors of everything asked there.

The package `kaggle` (with `six`, which it imports and does not declare) is an optional one, imported only here and where
a request is made: importing it already signs in.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
from pathlib import Path
from typing import Any

from ekiden.errors import UserError

TIMEOUT_SECONDS = 120.0
"""Of one request; the client itself would wait for ever on a connection that died."""
SIGN_IN = "set KAGGLE_API_TOKEN to a token from kaggle.com/settings, or run `kaggle auth login`"
OLDEST = (2, 2, 1)
"""Of the client: before, it knows no quota, and lists no more than the first files of an output."""


class KaggleError(UserError):
    """Kaggle refused something or could not be reached."""


class Ambiguous(KaggleError):
    """A request may or may not have been carried out: its answer was lost."""


def signed_in() -> Any:
    """Return an authenticated KaggleApi.

    Raises:
        KaggleError: the package is missing or too old, or signing in failed.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            from kaggle.api.kaggle_api_extended import KaggleApi
    except ImportError as error:
        raise KaggleError(f"Kaggle's client is missing ({error}); pip install 'ekiden[kaggle]'") from None

    check_version()

    class PatientApi(KaggleApi):  # type: ignore[misc]
        """The client, whose requests end."""

        def build_kaggle_client(self) -> Any:
            client = super().build_kaggle_client()
            client.http_client()._init_session()
            _limit(client.http_client()._session)
            return client

    api = PatientApi()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            api.authenticate()
    except SystemExit:
        raise KaggleError(_refusal()) from None
    except ValueError as error:
        raise KaggleError(
            f"Kaggle's credentials cannot be read ({type(error).__name__}); {SIGN_IN}"
        ) from None
    return api


def _limit(session: Any) -> None:
    """Give every request of a session a time limit."""
    send = session.send

    def limited(request: Any, **options: Any) -> Any:
        return send(request, **{**options, "timeout": options.get("timeout") or TIMEOUT_SECONDS})

    session.send = limited


def _refusal() -> str:
    """Return the sentence for a client that found no credentials that count: which it found is what helps, never their text."""
    if os.environ.get("KAGGLE_API_TOKEN"):
        return f"Kaggle does not accept the token in KAGGLE_API_TOKEN; {SIGN_IN}"
    folder = Path("~/.kaggle").expanduser()
    found = [str(folder / name) for name in ("access_token", "kaggle.json") if (folder / name).exists()]
    if found:
        return f"Kaggle does not accept the credentials in {' and '.join(found)}; {SIGN_IN}"
    return f"Kaggle knows no credentials: {SIGN_IN}"


def check_version() -> None:
    """Refuse a client that cannot do what is asked of it.

    Raises:
        KaggleError: it is too old.
    """
    version = importlib.metadata.version("kaggle")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        raise KaggleError(f"Kaggle's client {version} is too old; pip install --upgrade 'ekiden[kaggle]'")
