"""Where a mirror keeps its files: a folder, S3, or any other place that fsspec reaches.

`checkpoint.mirror` decides what is stored, in which order, and what may go; a back end only lists, stores, reads and
removes, and tells as well as its server can whether what stands there is what was sent. The Hugging Face Hub is in
`mirror_hub`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.checkpoint.mirror_files import FOLDER, Backend, Entry, Source, is_ours
from ekiden.errors import UsageError, UserError
from ekiden.optional import check_installed

READ_BYTES = 16 << 20
PART_BYTES = 32 << 20
S3_ATTEMPTS = 3
_S3_MAX_PARTS = 10_000
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_S3_CONNECT_SECONDS, _S3_READ_SECONDS = 10, 60


class FolderBackend:
    """A folder of a mounted disk; every write is on the disk before the next one begins."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def listing(self) -> dict[str, Entry]:
        """Return the files there."""
        found = {}
        for path in self.root.iterdir() if self.root.is_dir() else ():
            below = path.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir() else (path,)
            for file in below:
                name = file.relative_to(self.root).as_posix()
                if is_ours(name):
                    found[name] = Entry(file.lstat().st_size)
        return found

    def holds(self, name: str, entry: Entry, source: Source) -> bool:
        """Read it back and compare."""
        return entry.size == source.size and _sha256_of(self, name, entry.size) == source.sha256

    def put(self, sources: Mapping[str, Source]) -> None:
        """Write the files, each whole under its name or not at all."""
        files.make_folders(self.root)
        for name, source in sources.items():
            target = self.root / name
            if target.parent != self.root:
                files.make_folders(target.parent)
            temporary = target.with_name(".tmp-mirror")
            files.remove_file(temporary)
            with files.DurableFile(temporary) as file:
                for chunk in source.chunks():
                    file.write(chunk)
            files.rename(temporary, target)
            files.sync_folder(target.parent)

    def publish(self, name: str, source: Source, commits: list[str], folders: list[str]) -> None:
        """Write it, read it back, then remove the old ones."""
        self.put({name: source})
        _require(self.holds(name, Entry((self.root / name).stat().st_size), source), name)
        self.remove(commits, folders)

    def remove(self, commits: list[str], folders: list[str]) -> None:
        """Remove the commits, durably, then the folders."""
        for commit in commits:
            files.remove_file(self.root / commit)
        files.sync_folder(self.root)
        for folder in folders:
            files.remove_tree(self.root / folder)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Read from the file."""
        with files.open_regular(self.root / name) as file:
            file.seek(offset)
            parts: list[bytes] = []
            while (missing := length - sum(map(len, parts))) > 0 and (part := file.read(missing)):
                parts.append(part)
        return b"".join(parts)


class FsspecBackend:
    """Any place that fsspec can write to, and whose hashes it does not tell: what is sent is read back."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def listing(self) -> dict[str, Entry]:
        """Return the files there."""
        self.fs.invalidate_cache()
        found = {}
        for path, info in self._find().items():
            name = path[len(self.root) :].lstrip("/")
            if is_ours(name):
                found[name] = Entry(int(info["size"]), str(info.get("ETag") or "").strip('"'))
        return found

    def _find(self) -> dict[str, dict[str, Any]]:
        try:
            return self.fs.find(self.root, detail=True)
        except FileNotFoundError:
            return {}

    def holds(self, name: str, entry: Entry, source: Source) -> bool:
        """Read it back and compare."""
        return entry.size == source.size and _sha256_of(self, name, entry.size) == source.sha256

    def put(self, sources: Mapping[str, Source]) -> None:
        """Send the files."""
        for name, source in sources.items():
            path = self._path(name)
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._send(source, path)

    def _send(self, source: Source, path: str) -> None:
        if source.path is None:
            self.fs.pipe_file(path, source.data)
        else:
            self.fs.put_file(str(source.path), path)

    def publish(self, name: str, source: Source, commits: list[str], folders: list[str]) -> None:
        """Send it, read it back, then remove the old ones."""
        self.put({name: source})
        _require(self.read(name, 0, source.size + 1) == source.data, name)
        self.remove(commits, folders)

    def remove(self, commits: list[str], folders: list[str]) -> None:
        """Remove what is still there of them."""
        for commit in commits:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._path(commit))
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(self._path(folder), recursive=True)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Fetch that range."""
        return self.fs.cat_file(self._path(name), start=offset, end=offset + length)


class S3Backend(FsspecBackend):
    """A bucket, whose ETag is an MD5 of the object unless it is encrypted with a key of the user's."""

    def __init__(self, root: str) -> None:
        import s3fs

        config = {
            "connect_timeout": _S3_CONNECT_SECONDS,
            "read_timeout": _S3_READ_SECONDS,
            "retries": {"total_max_attempts": S3_ATTEMPTS},
            # The mirror compares hashes of its own; an object that fails the server's is to be named, not unreadable.
            "response_checksum_validation": "when_required",
        }
        # An instance of its own, without a cache of listings: what stands there is asked for every time.
        fs = s3fs.S3FileSystem(
            use_listings_cache=False, skip_instance_cache=True, config_kwargs=config, max_concurrency=2
        )
        fs.retries = S3_ATTEMPTS
        super().__init__(fs, root)
        self._tells_md5 = True

    def _find(self) -> dict[str, dict[str, Any]]:
        try:
            return self.fs.find(self.root, detail=True)
        except FileNotFoundError as error:
            # A bucket that is not there, perhaps misspelt, is no empty mirror.
            raise FileNotFoundError(f"there is no bucket {self.root.partition('/')[0]}") from error

    def put(self, sources: Mapping[str, Source]) -> None:
        """Send the files, the smallest first, so that a server that refuses is noticed early."""
        for name, source in sorted(sources.items(), key=lambda item: item[1].size):
            self._send(source, self._path(name))

    def _send(self, source: Source, path: str) -> None:
        part = _part_bytes(source.size)
        if source.path is None:
            self.fs.pipe_file(path, source.data, chunksize=part)
        else:
            self.fs.put_file(str(source.path), path, chunksize=part)

    def holds(self, name: str, entry: Entry, source: Source) -> bool:
        """Compare with the ETag; where that is no MD5, read one back, and from then on only the size is known."""
        if entry.size != source.size:
            return False
        if not self._tells_md5 or entry.digest == s3_etag(source):
            return True
        same = _sha256_of(self, name, entry.size) == source.sha256
        self._tells_md5 = self._tells_md5 and not same
        return same


def _part_bytes(size: int) -> int:
    return max(PART_BYTES, math.ceil(size / _S3_MAX_PARTS))


def s3_etag(source: Source) -> str:
    """Return the ETag that S3 gives to `source`: its MD5, or that of its parts' MD5s where it is sent in parts."""
    part = _part_bytes(source.size)
    digests, left = [hashlib.md5(usedforsecurity=False)], part
    in_parts = source.size >= 2 * part
    for chunk in source.chunks():
        while in_parts and len(chunk) > left:
            digests[-1].update(chunk[:left])
            chunk, left = chunk[left:], part
            digests.append(hashlib.md5(usedforsecurity=False))
        digests[-1].update(chunk)
        left -= len(chunk)
    if not in_parts:
        return digests[0].hexdigest()
    whole = hashlib.md5(b"".join(digest.digest() for digest in digests), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(digests)}"


def read_file(read: Callable[[str, int, int], bytes], name: str, size: int) -> Iterator[bytes]:
    """Yield the bytes of a file on the mirror, fetched by `read`; at most one more than `size` tells a longer one."""
    offset = 0
    while offset < size:
        # Never a range that begins at the end: S3 calls that an error.
        left = size - offset
        chunk = read(name, offset, left + 1 if left <= READ_BYTES else READ_BYTES)
        yield chunk
        offset += len(chunk)
        if not chunk:
            return


def _sha256_of(backend: Backend, name: str, size: int) -> str:
    digest = hashlib.sha256()
    for chunk in read_file(backend.read, name, size):
        digest.update(chunk)
    return digest.hexdigest()


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise OSError(f"{name} does not stand there as it was sent")


def open_backend(url: str) -> Backend:
    """Return the back end for `url`; arguments and errors as `mirror.open_mirror`."""
    protocol, separator, rest = url.partition("://")
    if not separator:
        protocol, rest = "file", url
    if "::" in url or not rest.strip("/") or (not separator and re.match(r"[a-z0-9]{2,}:", url)):
        raise UsageError(
            f"--mirror {url} is not a place; give hf://OWNER/REPO, s3://BUCKET/FOLDER, file:///FOLDER or a folder"
        )
    if protocol in ("file", "local"):
        return FolderBackend(Path(rest).expanduser().absolute())
    if protocol == "hf":
        return _open_hub(url, rest)
    return _open_fsspec(url, protocol, rest)


def _open_hub(url: str, repo_id: str) -> Backend:
    if not _HUB_NAME.fullmatch(repo_id):
        raise UsageError(f"--mirror {url} does not name a model repository; give hf://OWNER/REPO")
    import huggingface_hub

    from ekiden.checkpoint.mirror_hub import HubBackend

    token = huggingface_hub.get_token()
    if not token:
        raise UserError(
            f"--mirror {url} needs a token with write access; set HF_TOKEN or run `hf auth login`"
        )
    return HubBackend(repo_id, token, os.environ.get("HF_ENDPOINT"))


def _open_fsspec(url: str, protocol: str, rest: str) -> Backend:
    import fsspec
    from fsspec.registry import known_implementations

    known = known_implementations.get(protocol)
    if known is None or protocol in ("http", "https", "data", "github", "git", "zip", "tar", "reference"):
        raise UsageError(
            f"--mirror {url}: {protocol}:// cannot be written to; give hf://OWNER/REPO, s3://BUCKET/FOLDER, "
            "file:///FOLDER or another URL of fsspec"
        )
    package = known["class"].partition(".")[0]
    check_installed(package, f"--mirror {url}", extra="s3" if package == "s3fs" else None)
    try:
        if protocol in ("s3", "s3a"):
            _require_s3_credentials(url)
            return S3Backend(rest)
        fs, root = fsspec.core.url_to_fs(url)
    except UserError:
        raise
    except Exception as error:  # of whichever package it is
        raise UserError(f"--mirror {url} cannot be opened: {error}; mend that or leave it out") from error
    return FsspecBackend(fs, root)


def _require_s3_credentials(url: str) -> None:
    import botocore.session

    if botocore.session.get_session().get_credentials() is None:
        raise UserError(
            f"--mirror {url} needs credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or run `aws configure`"
        )
