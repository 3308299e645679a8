"""Kaggle's official client, as `upload` and `relay` need it: typed answers, patience, and no secret ever shown.

The package `kaggle` (with `six`, which it imports and does not declare) is an optional one. It signs in by its own ways
only (KAGGLE_API_TOKEN, ~/.kaggle/access_token, kaggle.json, `kaggle auth login`). What its command line hides behind
status 0 is an error here: a push refused for quota or sessions, sources that were dropped, files that were not uploaded.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ekiden.kaggle.signin import TIMEOUT_SECONDS, Ambiguous, KaggleError, signed_in
from ekiden.progress import human_duration, say

Result = TypeVar("Result")

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, TRIES = 2.0, 300.0, 60
"""Between tries of a request that failed in passing: 2 s, then twice as long up to 5 minutes, 4 hours together."""
SIGN_IN_TRIES = 4
"""14 seconds."""


@dataclass(frozen=True)
class Push:
    """Kaggle's answer to a push. error: why it was refused, or empty. invalid: sources it dropped."""

    error: str
    version: int
    invalid: tuple[str, ...]


@dataclass(frozen=True)
class Quota:
    """The week's GPU hours, in seconds; refresh: when the next week begins (UTC)."""

    used: float
    allowed: float
    refresh: datetime.datetime

    @property
    def left(self) -> float:
        """Seconds left."""
        return max(0.0, self.allowed - self.used)


class Kaggle:
    """A signed-in client.

    Args:
        wait: sleeps for so many seconds (tests replace it). tries: of a request that fails in passing.

    Raises:
        KaggleError: the package is missing, or there are no credentials that Kaggle accepts.
    """

    def __init__(self, wait: Callable[[float], None] = time.sleep, tries: int = TRIES) -> None:
        self._wait = wait
        # Somebody waits for the first answer: without a network it is a sentence, not four hours.
        self._tries = min(SIGN_IN_TRIES, tries)
        self._api = self._retry("signing in", signed_in)
        self._tries = tries
        self.user = str(self._api.config_values[self._api.CONFIG_NAME_USER])

    def _retry(self, what: str, work: Callable[[], Result], once: bool = False) -> Result:
        """Do `work` until it succeeds or fails for good.

        Args:
            once: it must not be done twice: only refusals that certainly changed nothing (429) are tried again.

        Raises:
            Ambiguous: `once`, and the answer was lost. KaggleError: refused, or still failing after all tries.
        """
        import requests

        delay, problem = FIRST_WAIT_SECONDS, ""
        for left in reversed(range(self._tries)):
            try:
                return work()
            except requests.HTTPError as error:
                code = error.response.status_code if error.response is not None else 0
                problem = f"HTTP {code}: {_first_line(error)}"
                if code != 429 and (once and code >= 500):
                    raise Ambiguous(f"Kaggle, {what}: {problem}; run the same command again") from None
                if code != 429 and code < 500:
                    raise KaggleError(f"Kaggle, {what}: {problem}{_advice(code)}") from error
                delay = max(delay, _retry_after(error.response))
            except (requests.RequestException, OSError) as error:
                problem = _short(error)
                if once:
                    raise Ambiguous(f"Kaggle, {what}: {problem}; run the same command again") from None
            if not left:
                break
            say(f"Kaggle, {what}: {problem}; trying again in {human_duration(delay)}")
            self._wait(delay)
            delay = min(LONGEST_WAIT_SECONDS, 2 * delay)
        raise KaggleError(f"Kaggle, {what}: {problem}; run the same command again later")

    # -- kernels ------------------------------------------------------------------------------------------------

    def push(self, folder: Path, accelerator: str | None, timeout_seconds: int) -> Push:
        """Push the script in `folder` (with its kernel-metadata.json), which starts a session.

        Raises:
            Ambiguous: it may have been pushed. KaggleError: refused.
        """
        timeout, quiet = str(timeout_seconds), contextlib.redirect_stdout(io.StringIO())

        def work() -> Any:
            """Push once."""
            with quiet:
                return self._api.kernels_push(str(folder), timeout, accelerator)

        answer = self._retry("pushing", work, once=True)
        if answer is None:
            raise Ambiguous("Kaggle, pushing: no answer; run the same command again")
        kinds = ("dataset", "kernel", "model", "competition")
        invalid = [
            source for kind in kinds for source in getattr(answer, f"invalid_{kind}_sources", None) or []
        ]
        return Push(answer.error or "", int(answer.version_number or 0), tuple(invalid))

    def session(self, ref: str) -> tuple[str, str]:
        """Return status (QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_ACKNOWLEDGED, ...) and failure message of the newest
        session of a script."""
        answer = self._retry(f"status of {ref}", lambda: self._guarded(lambda: self._api.kernels_status(ref)))
        status = getattr(answer.status, "name", str(answer.status)).upper()
        return status.rpartition(".")[2], answer.failure_message or ""

    def _guarded(self, work: Callable[[], Result]) -> Result:
        """Do `work`; the client turns a 401 or 403 into a ValueError without its response."""
        try:
            return work()
        except ValueError as error:
            raise KaggleError(f"Kaggle: {_first_line(error)}") from error

    def source(self, ref: str) -> str:
        """Return the text of a script's newest version; empty where there is none of that name."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

        owner, slug = ref.split("/")

        def work() -> str:
            """Ask once."""
            with self._api.build_kaggle_client() as client:
                request = ApiGetKernelRequest()
                request.user_name, request.kernel_slug = owner, slug
                return str(client.kernels.kernels_api_client.get_kernel(request).blob.source or "")

        return self._unless_missing(f"source of {ref}", work, "")

    def _unless_missing(self, what: str, work: Callable[[], Result], missing: Result) -> Result:
        """Do `work`; return `missing` where Kaggle says that there is no such thing (403 or 404)."""
        try:
            return self._retry(what, work)
        except KaggleError as error:
            response = getattr(error.__cause__, "response", None)
            if response is not None and response.status_code in (403, 404):
                return missing
            raise

    def outputs(self, ref: str) -> dict[str, str]:
        """Return the output files of a script's newest session: address by name. Empty where there is none."""
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

        owner, slug = ref.split("/")
        found: dict[str, str] = {}
        token = ""
        while True:

            def work(token: str = token) -> Any:
                """Ask for one page."""
                with self._api.build_kaggle_client() as client:
                    request = ApiListKernelSessionOutputRequest()
                    request.user_name, request.kernel_slug = owner, slug
                    request.page_size, request.page_token = 200, token
                    return client.kernels.kernels_api_client.list_kernel_session_output(request)

            answer = self._unless_missing(f"output of {ref}", work, None)
            if answer is None:
                return {}
            found |= {item.file_name: item.url for item in answer.files or []}
            token = answer.next_page_token
            if not token:
                return found

    def fetch(self, url: str, target: Path) -> None:
        """Download one file, going on where a try before broke off.

        Raises:
            KaggleError: it cannot be had.
        """
        import requests

        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_name(f".{target.name}.part")
        half.unlink(missing_ok=True)

        def work() -> None:
            """Ask for what is still missing."""
            have = half.stat().st_size if half.exists() else 0
            headers = {"Range": f"bytes={have}-"} if have else {}
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as answer:
                if answer.status_code == 416:
                    half.unlink()
                answer.raise_for_status()
                expected = int(answer.headers.get("Content-Length", -1))
                with half.open("ab" if answer.status_code == 206 else "wb") as file:
                    before = file.tell()
                    for data in answer.iter_content(1 << 20):
                        file.write(data)
                    if expected >= 0 and file.tell() - before != expected:
                        raise OSError(f"{file.tell() - before} of {expected} bytes came")

        self._retry(f"downloading {target.name}", work)
        half.replace(target)

    def delete_script(self, ref: str) -> None:
        """Delete a script and everything it put out; its running session ends."""
        quiet = contextlib.redirect_stdout(io.StringIO())

        def work() -> None:
            """Delete it once."""
            with quiet:
                self._api.kernels_delete(ref, no_confirm=True)

        self._unless_missing(f"deleting {ref}", work, None)

    def quota(self) -> Quota:
        """Return the week's GPU quota, with what running sessions have reserved counted as used."""
        answer = self._retry("quota", self._api.quota_view)
        gpu = answer.gpu_quota
        used = sum(
            (part or datetime.timedelta()).total_seconds() for part in (gpu.time_used, gpu.time_reserved)
        )
        refresh = answer.quota_refresh_time.replace(tzinfo=datetime.UTC)
        return Quota(used, gpu.total_time_allowed.total_seconds(), refresh)

    # -- datasets -----------------------------------------------------------------------------------------------

    def dataset_ready(self, ref: str) -> bool | None:
        """Return whether the newest version of a dataset is ready; None where there is no such dataset.

        Raises:
            KaggleError: Kaggle could not process it.
        """
        status = self._unless_missing(f"status of {ref}", lambda: str(self._api.dataset_status(ref)), "")
        if status in ("failed", "deleted"):
            raise KaggleError(f"Kaggle: dataset {ref} is {status}; delete it on kaggle.com and upload again")
        return None if not status else status == "ready"

    def dataset_files(self, ref: str) -> dict[str, int]:
        """Return name and size of the files that Kaggle lists for a dataset; empty where there is none."""
        found: dict[str, int] = {}
        token: str | None = None
        while True:
            work = _bind(self._api.dataset_list_files, ref, token)
            answer = self._unless_missing(f"files of {ref}", work, None)
            if answer is None:
                return {}
            found |= {file.name: int(file.total_bytes) for file in answer.files or []}
            token = answer.next_page_token
            if not token:
                return found

    def dataset_file(self, ref: str, name: str, folder: Path) -> Path:
        """Download one small file of a dataset into `folder`."""

        def work() -> None:
            """Download it once."""
            with contextlib.redirect_stdout(io.StringIO()):
                self._api.dataset_download_file(ref, name, path=str(folder), force=True, quiet=True)

        self._retry(f"{name} of {ref}", work)
        return folder / name

    def upload(self, ref: str, title: str, folder: Path, exists: bool) -> None:
        """Upload the files in `folder` as a private dataset or a new version of it; a broken upload goes on.

        Raises:
            KaggleError: a file did not arrive; none of it counts, and the same call goes on from there.
        """
        request, create = self._creation(ref, title, exists)
        body = request.body if exists else request
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        for attempt in range(3):
            body.files = []
            try:
                with (
                    self._uploading(folder, names, body, fresh=attempt == 2),
                    self._api.build_kaggle_client() as client,
                ):
                    answer = self._retry(f"creating {ref}", lambda: create(client)(request))
            except _Incomplete as problem:
                say(f"{ref}: {problem}; going on with what is missing")
                self._wait(FIRST_WAIT_SECONDS)
                continue
            if answer.error or answer.status.lower() == "error":
                raise KaggleError(f"Kaggle did not take {ref}: {answer.error or answer.status}")
            return
        raise KaggleError(f"{ref}: files of {folder} did not arrive; run the same command again to go on")

    @contextlib.contextmanager
    def _uploading(self, folder: Path, names: list[str], body: Any, fresh: bool) -> Iterator[None]:
        """Send the files; what the client notes for going on is dropped only where the body succeeds.

        Args:
            fresh: forget those notes first: an upload that Kaggle has let expire cannot be gone on with.
        """
        from kaggle.api.kaggle_api_extended import ResumableUploadContext
        from kagglesdk.blobs.types.blob_api_service import ApiBlobType

        with ResumableUploadContext() as context:
            for name in names if fresh else ():
                Path(context.get_upload_info_file_path(str(folder / name))).unlink(missing_ok=True)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                try:
                    self._api.upload_files(body, None, str(folder), ApiBlobType.DATASET, context, quiet=True)
                except (
                    ValueError,
                    RuntimeError,
                    OSError,
                ) as error:  # from 2.2.5 on; before, files are left out
                    raise _Incomplete(_first_line(error)) from error
            if len(body.files) != len(names):
                lines = said.getvalue().strip().splitlines() or [""]
                raise _Incomplete(
                    f"{len(names) - len(body.files)} of {len(names)} files did not arrive {lines[-1]}"
                )
            yield

    def _creation(
        self, ref: str, title: str, exists: bool
    ) -> tuple[Any, Callable[[Any], Callable[[Any], Any]]]:
        """Return the request for a dataset (or its next version), and what sends it through a client."""
        from kagglesdk.datasets.types import dataset_api_service as types

        owner, slug = ref.split("/")
        if exists:
            version = types.ApiCreateDatasetVersionRequest()
            version.owner_slug, version.dataset_slug = owner, slug
            version.body = types.ApiCreateDatasetVersionRequestBody()
            version.body.version_notes, version.body.delete_old_versions = "ekiden", True
            return version, lambda client: client.datasets.dataset_api_client.create_dataset_version
        new = types.ApiCreateDatasetRequest()
        new.owner_slug, new.slug, new.title = owner, slug, title
        new.license_name, new.is_private = "other", True
        return new, lambda client: client.datasets.dataset_api_client.create_dataset


class _Incomplete(Exception):
    """Files did not arrive."""


def _bind(work: Callable[..., Any], ref: str, token: str | None) -> Callable[[], Any]:
    return lambda: work(ref, page_token=token, page_size=200)


def _first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, without what follows a query (signed addresses are secrets)."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\?\S+", "", line)[:300]


def _short(error: Exception) -> str:
    """Return what failed without an answer, in few words: the library's own say addresses, objects and causes."""
    import requests

    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "Kaggle cannot be reached, or the connection broke"
    return f"{type(error).__name__}: {_first_line(error)}"


def _retry_after(response: Any) -> float:
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def _advice(code: int) -> str:
    if code == 401:
        return "; sign in again (KAGGLE_API_TOKEN, or `kaggle auth login`)"
    if code == 403:
        return "; is the name right, and the account verified by phone?"
    return ""
