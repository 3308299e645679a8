"""Datasets of the Hugging Face hub as corpora: `hf://datasets/OWNER/NAME[@config][:split]`.

`hub_files` asks the hub once, at the start, which files a configuration and a split consist of, pinned to the commit
they have then; `HubFile` reads one of them in byte ranges through the hub's own HTTP client, in whatever process it
is opened. Nothing is stored on the disk. A lost connection costs the range that was under way (8 MB), and a build that
was killed asks for the same commit's bytes again. What cannot be mended by waiting is one sentence.
"""

from __future__ import annotations

import importlib
import io
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from ekiden.corpus.formats import FORMATS, SourceFile
from ekiden.errors import UserError, nearest
from ekiden.progress import say

PREFIX = "hf://datasets/"
BLOCK_BYTES = 8 << 20
"""Bytes asked for at a time: what a lost connection costs, and what an open file holds in memory."""

MAX_RETRIES, MAX_WAIT = 20, 30.0
"""Retries of one range and seconds between two at most: about 8 minutes until a dead network ends a build."""

PASSING_CODES = (408, 429, 500, 502, 503, 504)
TIMEOUT = 30.0
_PLANNING_RETRIES = 5
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_JSON = {".json": ".jsonl", ".json.gz": ".jsonl.gz", ".json.zst": ".jsonl.zst"}
"""Many datasets name JSON lines so; a file that holds one JSON array is counted as rejected, not read."""

T = TypeVar("T")


@dataclass(frozen=True)
class Address:
    """The parts of `hf://datasets/OWNER/NAME[@config][:split]`; `repo` is OWNER/NAME."""

    repo: str
    config: str | None
    split: str | None

    @property
    def page(self) -> str:
        """The page where a person can see the dataset and accept its conditions."""
        return f"https://huggingface.co/datasets/{self.repo}"


def parse(argument: str) -> Address:
    """Return the parts of a hub address.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^:/@]+))?(?::([\w.-]+))?", argument)
    if match is None:
        raise UserError(
            f"corpus {argument} is no hub dataset; write hf://datasets/OWNER/NAME[@config][:split]"
        )
    return Address(match[1], match[2], match[3])


def hub_files(argument: str, commits: Mapping[str, str] | None = None) -> list[SourceFile]:
    """Return the files of a dataset on the hub, sorted, with the commit in their paths.

    Args:
        argument: hf://datasets/OWNER/NAME[@config][:split].
        commits: OWNER/NAME: commit, of an earlier start that is taken up; others: the newest.

    Raises:
        UserError: it is missing, private, gated, offline, or has no such configuration or split, or no file that is read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    address = parse(argument)
    commit = (commits or {}).get(address.repo)
    api = HfApi()
    info = _ask(address, lambda: api.dataset_info(address.repo, revision=commit, timeout=TIMEOUT))
    _ask(address, lambda: api.auth_check(address.repo, repo_type="dataset"))
    tree = _ask(
        address,
        lambda: list(
            api.list_repo_tree(address.repo, recursive=True, revision=info.sha, repo_type="dataset")
        ),
    )
    sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile) and entry.size}
    card = info.card_data.to_dict() if info.card_data else {}
    chosen = choose(address, list(sizes), card.get("configs") or [])
    return [
        SourceFile(
            f"{PREFIX}{address.repo}@{info.sha}/{path}",
            sizes[path],
            kind,
            f"{address.repo}@{info.sha}/{path}",
        )
        for path in sorted(chosen)
        if (kind := _format(path))
    ]


def _format(path: str) -> str | None:
    """Return the format of a file on the hub by its name, one of FORMATS; None: not one that is read."""
    name = path.rsplit("/", 1)[-1]
    for suffix, kind in [*((suffix, suffix) for suffix in FORMATS), *_JSON.items()]:
        if name.endswith(suffix) and not name.startswith("."):
            return kind
    return None


def choose(address: Address, paths: list[str], configs: list[dict[str, Any]]) -> list[str]:
    """Return the paths of a configuration's split.

    Args:
        paths: all files of the repository.
        configs: as the dataset's card lists them, with the globs of their files; without any, folders are
            configurations, and `train`, `validation` and `test` are found in the names of files and folders.

    Raises:
        UserError: there is no such configuration, split or readable file.
    """
    if configs:
        patterns = _card_patterns(address, configs)
        if address.split:
            if address.split not in patterns:
                raise UserError(
                    f"{address.page} has no split {address.split!r}{nearest(address.split, patterns)}; it has "
                    f"{', '.join(sorted(patterns))}"
                )
            patterns = {address.split: patterns[address.split]}
        elif "train" in patterns:
            patterns = {"train": patterns["train"]}
        found = _matching(paths, [pattern for globs in patterns.values() for pattern in globs])
    else:
        found = _by_names(address, [path for path in paths if _format(path)])
    readable = [path for path in found if _format(path)]
    if not readable:
        others = sorted({path.rsplit(".", 1)[-1] for path in found or paths if "." in path})
        raise UserError(
            f"{address.page} holds no {', '.join(FORMATS)} file of "
            f"{'@' + address.config if address.config else 'any configuration'}"
            f"{':' + address.split if address.split else ''} (its files end in {', '.join(others) or 'nothing'}); "
            "choose another configuration or split, or convert it"
        )
    return readable


def _card_patterns(address: Address, configs: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the globs of each split of the configuration that is asked for, or of the only or default one."""
    named = {str(config.get("config_name", "default")): config for config in configs}
    default = next(
        (name for name, config in named.items() if config.get("default") or name == "default"), None
    )
    name = address.config or default or (next(iter(named)) if len(named) == 1 else None)
    if name not in named:
        what = f"no configuration {name!r}{nearest(name, named)}" if name else "several configurations"
        names = ", ".join(sorted(named)[:20]) + (" ..." if len(named) > 20 else "")
        raise UserError(
            f"{address.page} has {what}; write {PREFIX}{address.repo}@CONFIG, where CONFIG is one of {names}"
        )
    config = named[name]
    folder = str(config.get("data_dir") or "").strip("/")
    listed = config.get("data_files") or "**"
    if isinstance(listed, str) or all(isinstance(entry, str) for entry in listed):
        listed = [{"split": "train", "path": listed}]
    patterns: dict[str, list[str]] = {}
    for entry in listed:
        globs = [entry["path"]] if isinstance(entry["path"], str) else list(entry["path"])
        prefix = f"{folder}/" if folder else ""
        patterns.setdefault(str(entry.get("split", "train")), []).extend(prefix + glob for glob in globs)
    return patterns


def _matching(paths: list[str], globs: Iterable[str]) -> list[str]:
    from fsspec.utils import glob_translate

    expressions = [re.compile(glob_translate(glob.removeprefix("./"))) for glob in globs]
    return [path for path in paths if any(expression.match(path) for expression in expressions)]


def _by_names(address: Address, paths: list[str]) -> list[str]:
    """Return the paths of a dataset whose card lists nothing."""
    if address.config:
        folders = {folder for path in paths for folder in path.split("/")[:-1]}
        if address.config not in folders:
            raise UserError(
                f"{address.page} has no configuration {address.config!r}{nearest(address.config, folders)}; its folders are "
                f"{', '.join(sorted(folders)[:20]) or 'none'}"
            )
        paths = [path for path in paths if address.config in path.split("/")[:-1]]
    split = address.split or "train"
    words = _SPLITS.get(split, (split,))
    pattern = re.compile(rf"(?:^|[-._ /])(?:{'|'.join(map(re.escape, words))})(?:[-._ /0-9]|$)")
    found = [path for path in paths if pattern.search(path)]
    if not found and address.split:
        raise UserError(
            f"{address.page} has no file of a split {address.split!r}; leave the split out to take all files"
        )
    return found or paths


def _ask(address: Address, call: Callable[[], T]) -> T:
    """Return what `call` returns, tried again while the hub is out of reach.

    Raises:
        UserError: the hub refused, or stayed out of reach.
    """
    wait = 1.0
    for remaining in reversed(range(_PLANNING_RETRIES + 1)):
        try:
            return call()
        except Exception as error:
            if not remaining or not _passing(error):
                raise sentence(address, error) from None
            say(f"the hub cannot be reached ({_short(error)}); trying again in {wait:.0f} s")
            time.sleep(wait)
            wait = min(MAX_WAIT, 2 * wait)
    raise AssertionError("the loop returns or raises")


def _passing(error: Exception) -> bool:
    """Return whether waiting may mend it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, _http().TransportError) or status in PASSING_CODES


def _http() -> Any:
    """Return the HTTP library that the installed hub client stands on (httpx, later httpx2), for its exceptions."""
    from huggingface_hub.utils import get_session

    return importlib.import_module(type(get_session()).__module__.split(".")[0])


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no more is known'}"


def sentence(address: Address, error: Exception) -> UserError:
    """Return the one sentence that says what a person can do about an error of the hub's client."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "log in by `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        text = (
            f"is gated; accept its conditions on {address.page}, then {login}, and run the same command again"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"is not on the hub, or is private; look for it at {address.page}, and if it is private {login}"
        )
    elif isinstance(error, errors.RevisionNotFoundError | errors.EntryNotFoundError):
        text = f"has changed while it was read and the file is gone; see {address.page} and preprocess into a new folder"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        text = "cannot be read offline; unset HF_HUB_OFFLINE, or give a folder with the files"
    elif status in (401, 403):
        text = (
            f"is refused to this token (status {status}); {login} with a token that may read {address.page}"
        )
    elif status == 429:
        text = f"is refused for now, too many requests (status 429); {login} for a higher limit, and run the same command again"
    elif status is not None:
        text = f"cannot be read, the hub answers with status {status}; run the same command again later"
    else:
        text = (
            f"cannot be read, the hub cannot be reached ({_short(error)}); mend the network and run the same command again, "
            "finished shards are kept"
        )
    return UserError(f"corpus {PREFIX}{address.repo} {text}")


def is_remote(path: str) -> bool:
    """Return whether a file is on the hub."""
    return path.startswith(PREFIX)


def open_source(file: SourceFile) -> IO[bytes]:
    """Return a file of a corpus, opened for reading bytes, wherever it is."""
    if is_remote(file.path):
        return io.BufferedReader(HubFile(file.path, file.size), 1 << 18)
    return Path(file.path).open("rb")


class HubFile(io.RawIOBase):
    """A file on the hub, read in ranges; seekable. Wrap it in io.BufferedReader to read lines.

    Args:
        path: as `hub_files` wrote it, hf://datasets/OWNER/NAME@COMMIT/PATH.
        size: bytes of the file.
    """

    def __init__(self, path: str, size: int) -> None:
        from huggingface_hub import hf_hub_url

        match = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", path)
        assert match is not None, path
        self.address, self.size = Address(match[1], None, None), size
        self._url = hf_hub_url(match[1], match[3], repo_type="dataset", revision=match[2])
        self._position = self._block_start = 0
        self._block = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position without asking the hub for anything."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the block in memory, or from a new one that begins here; 0 at the end."""
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self.size - self._position)
        if wanted <= 0:
            return 0
        offset = self._position - self._block_start
        if not 0 <= offset < len(self._block):
            self._block = self._fetch(
                self._position, min(self.size, self._position + max(wanted, BLOCK_BYTES))
            )
            self._block_start, offset = self._position, 0
        piece = self._block[offset : offset + wanted]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def _fetch(self, start: int, end: int) -> bytes:
        """Return bytes [start, end) of the file.

        Raises:
            UserError: the hub refused, or stayed out of reach.
        """
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        http = _http()
        try:
            response = http_backoff(
                "GET",
                self._url,
                max_retries=MAX_RETRIES,
                max_wait_time=MAX_WAIT,
                # Named, for the hub client's own choice before 2.0 gives up when a connection breaks off in the middle.
                retry_on_exceptions=(http.TimeoutException, http.NetworkError, http.RemoteProtocolError),
                retry_on_status_codes=PASSING_CODES,
                headers={
                    **build_hf_headers(),
                    "Range": f"bytes={start}-{end - 1}",
                    "Accept-Encoding": "identity",
                },
                timeout=TIMEOUT,
            )
            hf_raise_for_status(response)
            data: bytes = response.content
        except Exception as error:
            raise sentence(self.address, error) from None
        if response.status_code != 206 and (start, end) != (0, self.size):
            data = data[start:end]  # a server that knows no ranges sent the whole file
        if len(data) != end - start:
            raise UserError(
                f"corpus {self._url} has not the {self.size} bytes that the hub names; see {self.address.page}"
            )
        return data
