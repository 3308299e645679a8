"""A mirror in a private model repository of the Hugging Face Hub, through its own client.

A commit is atomic there: the data go in one, and a second one brings the object that makes them count and takes the
old step away. Large files are sent before their commit and one at a time, so that what a broken connection left is
found again, and no pool of threads holds up the end of the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    logging,
)

from ekiden.checkpoint.mirror_files import FOLDER, Entry, Source, is_ours
from ekiden.progress import say

TIMEOUT_SECONDS = 120.0


class HubBackend:
    """The repository `repo_id`; it is created, private, where there is none.

    Args:
        endpoint: address of the hub; None: the client's default.
    """

    def __init__(self, repo_id: str, token: str, endpoint: str | None = None) -> None:
        self.repo_id, self.token = repo_id, token
        self.api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
        self._head: str | None = None
        self._said = False
        # Its bars and its warnings of each retry would be drawn over the training's.
        disable_progress_bars()
        logging.set_verbosity_error()
        _bound_waiting()

    def listing(self) -> dict[str, Entry]:
        """Return the files of the newest commit; `digest` is 'sha256:' or 'git:' and the hash."""
        try:
            info = self.api.repo_info(self.repo_id)
        except RepositoryNotFoundError:
            # A private one that this token may not see looks the same; then this fails, and nothing is begun anew.
            self.api.create_repo(self.repo_id, private=True)
            info = self.api.repo_info(self.repo_id)
        self._head = info.sha
        found = {}
        for item in self.api.list_repo_tree(self.repo_id, recursive=True, revision=self._head):
            if isinstance(item, huggingface_hub.RepoFile) and is_ours(item.path):
                lfs = item.lfs
                found[item.path] = Entry(item.size, f"sha256:{lfs.sha256}" if lfs else f"git:{item.blob_id}")
        return found

    def holds(self, name: str, entry: Entry, source: Source) -> bool:
        """Compare with the hash that the hub tells, which is one of the content for either kind of file."""
        kind, _, digest = entry.digest.partition(":")
        if entry.size != source.size:
            return False
        return digest == (source.sha256 if kind == "sha256" else _git_sha1(source))

    def put(self, sources: Mapping[str, Source]) -> None:
        """Send the files and commit them together."""
        self._commit([self._addition(name, source) for name, source in sources.items()], "Data of a step")

    def _addition(self, name: str, source: Source) -> huggingface_hub.CommitOperationAdd:
        content = source.data if source.path is None else str(source.path)
        addition = huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        self.api.preupload_lfs_files(self.repo_id, [addition], num_threads=1, free_memory=False)
        return addition

    def publish(self, name: str, source: Source, commits: list[str], folders: list[str]) -> None:
        """Commit the file and the removals together; then free what only older commits still name."""
        addition = self._addition(name, source)
        self._commit([addition, *_removals(commits, folders)], f"{name.removesuffix('.json')} stands")
        self._free_space()

    def remove(self, commits: list[str], folders: list[str]) -> None:
        """Commit the removals, then free their space."""
        self._commit(_removals(commits, folders), "Older steps")
        self._free_space()

    def _commit(self, operations: list[Any], message: str) -> None:
        """Commit on top of what was listed; where another one came between, that fails."""
        info = self.api.create_commit(
            self.repo_id, operations, commit_message=message, parent_commit=self._head
        )
        self._head = info.oid

    def _free_space(self) -> None:
        """Delete large files of steps that are gone: the history would keep, and count, every one of them."""
        try:
            kept = self.listing()
            digests = {entry.digest for entry in kept.values()}
            gone = [
                item
                for item in self.api.list_lfs_files(self.repo_id)
                if FOLDER.fullmatch(item.filename.partition("/")[0])
                and item.filename not in kept
                and f"sha256:{item.oid}" not in digests
            ]
            if gone:
                # The pointers in older commits stay; the newest commit is not touched.
                self.api.permanently_delete_lfs_files(self.repo_id, gone, rewrite_history=False)
        except Exception as error:  # the mirror is whole without it
            if not self._said:
                say(f"{self.repo_id}: older steps still count towards its storage ({type(error).__name__})")
            self._said = True

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Fetch that range, as it stood when the files were listed."""
        revision = self._head or "main"
        url = huggingface_hub.hf_hub_url(self.repo_id, name, revision=revision, endpoint=self.api.endpoint)
        headers = {
            **build_hf_headers(token=self.token),
            "Accept-Encoding": "identity",
            "Range": f"bytes={offset}-{offset + length - 1}",
        }
        with get_session().stream("GET", url, headers=headers) as response:
            if response.status_code == 416:  # begins behind its end
                return b""
            hf_raise_for_status(response)
            # A server that knows no ranges sends all of it.
            skip = 0 if response.status_code == 206 else offset
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(data) >= length:
                    break
        return bytes(data[:length])


def _removals(commits: list[str], folders: list[str]) -> list[Any]:
    paths = [*commits, *(f"{folder}/" for folder in folders)]
    return [huggingface_hub.CommitOperationDelete(path) for path in paths]


def _git_sha1(source: Source) -> str:
    digest = hashlib.sha1(f"blob {source.size}\0".encode(), usedforsecurity=False)
    for chunk in source.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _bound_waiting() -> None:
    """Let the client give up on a connection that is silent for `TIMEOUT_SECONDS`; its default is never."""
    client = get_session()
    if client.timeout.read is not None:
        return
    kind, hooks = type(client), client.event_hooks
    huggingface_hub.set_client_factory(
        lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT_SECONDS)
    )
