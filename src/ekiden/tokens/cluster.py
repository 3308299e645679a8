"""The build on a Dask cluster: `ekiden preprocess --scheduler ADDRESS`.

A build takes any `concurrent.futures` executor; this one hands the units to the workers of a running Dask scheduler.
Units travel as names of files: corpus and output folder must be on a file system that this machine and all workers
see under the same paths, which is tried before the work begins. A unit whose worker dies is given to another one by
Dask itself; the shards are the same bytes as those of a build on one machine.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ekiden import __version__
from ekiden.checkpoint import files
from ekiden.errors import UserError
from ekiden.optional import require

CONNECT_SECONDS = 30
_at_work = threading.Lock()


class OneUnitAWorker(Executor):
    """Gives work to `inner`, whose workers may have several threads, so that a process does one thing at a time."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Schedule a call."""
        return self.inner.submit(alone, fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End it."""
        self.inner.shutdown(wait=wait)


def alone(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what `fn` returns, called while nothing else is in this worker process."""
    with _at_work:
        return fn(*args, **kwargs)


@contextmanager
def dask_executor(address: str, folder: Path, corpus: list[str]) -> Iterator[Executor]:
    """Yield an executor on the Dask scheduler at `address`.

    Args:
        folder: the output folder; corpus: files and folders. Both are looked for on every worker.

    Raises:
        UserError: Dask is missing, nobody answers, there is no worker, one sees other files or has another version, or
            a unit's workers died one after another.
    """
    distributed = require("distributed", "--scheduler", extra="dask")
    try:
        # A client of such an address waits a minute at the end of the program for a connection that it never had.
        distributed.comm.addressing.get_address_host_port(address, strict=True)
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(
            f"--scheduler {address} does not answer ({type(error).__name__}); give the address that `dask scheduler` prints, "
            "such as tcp://10.0.0.5:8786"
        ) from None
    try:
        check_workers(client, address, folder, corpus)
        yield OneUnitAWorker(client.get_executor(pure=False))
    except distributed.scheduler.KilledWorker as error:
        raise UserError(
            f"the workers that were given one unit died one after another ({error.last_worker.address} the last; killed for "
            "memory?); run the same command again, finished shards are kept"
        ) from None
    except (distributed.CancelledError, distributed.comm.CommClosedError) as error:
        raise UserError(
            f"--scheduler {address} went away ({type(error).__name__}); run the same command again, finished shards are kept"
        ) from None
    finally:
        client.close()


def check_workers(client: Any, address: str, folder: Path, corpus: list[str]) -> None:
    """Try that every worker has this program and sees the same files.

    Raises:
        UserError: one does not, or there is none.
    """
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError:
        raise UserError(
            f"--scheduler {address} has no worker; start some by `dask worker {address}`"
        ) from None
    files.make_folders(folder.parent)
    probe = folder.parent / f".{secrets.token_hex(8)}.probe.tmp"
    paths = [str(probe), *(path for path in corpus if not path.startswith("hf://"))]
    try:
        probe.touch()
        found = client.run(what_is_missing, paths, on_error="return")
    finally:
        probe.unlink(missing_ok=True)
    for worker, answer in found.items():
        if isinstance(answer, Exception):
            raise UserError(
                f"Dask worker {worker} cannot run ekiden {__version__} ({type(answer).__name__}: {answer}); install the same "
                "version there"
            )
        version, missing = answer
        if version != __version__:
            raise UserError(
                f"Dask worker {worker} has ekiden {version}, this machine {__version__}; install the same"
            )
        if missing:
            what = f"--output-dir {folder}" if missing == str(probe) else missing
            raise UserError(
                f"Dask worker {worker} does not see {what}; corpus and output folder must be on a file system that all "
                "machines share under the same paths"
            )


def what_is_missing(paths: list[str]) -> tuple[str, str | None]:
    """Return (version, the first of `paths` that is not there). Runs in a worker."""
    return __version__, next((path for path in paths if not Path(path).exists()), None)
