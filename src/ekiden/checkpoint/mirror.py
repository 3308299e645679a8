"""The newest checkpoint of a run kept a second time, elsewhere: for the day the machine is taken away.

`training.saving` hands every verified checkpoint to `mirror_uploader`, which comes here; at the start
`restore_from_mirror` takes the newer one of local disk and mirror. On the mirror, all data of a step stand in a folder
named after their hash; a small JSON object beside it, written last, makes them count:

    step-00000100-1f0c9a77d2be/model.safetensors, MANIFEST.json, ..., run-<hash>-history.jsonl
    step-00000100-<hash of this object>.json

Nothing that counts is ever overwritten, so that a kill at any moment, on any kind of storage, leaves the old one or the
new one. What comes back is not trusted: it is bounded, named by a fixed pattern, and verified before it gets its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ekiden.checkpoint import files
from ekiden.checkpoint.folder import Checkpoint
from ekiden.checkpoint.manifest import NAME, Damaged, verify_folder
from ekiden.checkpoint.mirror_backends import open_backend, read_file
from ekiden.checkpoint.mirror_files import COMMIT, Backend, Entry, Source
from ekiden.checkpoint.mirror_state import (
    MAX_COMMIT_BYTES,
    MirrorState,
    StoredFile,
    describe,
    other_run,
    parse_commit,
)
from ekiden.errors import UserError
from ekiden.progress import say

RETRY_SECONDS: tuple[float, ...] = (2.0, 15.0)
_Result = TypeVar("_Result")


class MirrorError(Exception):
    """The mirror could not be reached, refused, or holds something damaged; in words.

    The trainer says it and trains on. lasting: whether trying again is of no use.
    """

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class Mirror:
    """The mirror at `url`; made by `open_mirror`. To be used from one thread at a time."""

    def __init__(self, url: str, backend: Backend) -> None:
        self.url, self._backend = url, backend

    # -- reading ---------------------------------------------------------------------------------------------

    def newest(self) -> MirrorState | None:
        """Return the newest whole step, or None where the mirror was never written.

        Raises:
            MirrorError: it cannot be reached, or what stands there is damaged.
        """
        return next(iter(self.states()), None)

    def states(self) -> list[MirrorState]:
        """Return the whole steps, newest first: one, or more where an upload was cut short before its removals.

        Raises:
            MirrorError: as `newest`.
        """
        states, problems = self._retrying(lambda: self._states(self._listing()))
        if problems and not states:
            raise MirrorError(f"mirror {self.url} is damaged: {problems[0]}", lasting=True)
        for problem in problems:
            say(f"mirror {self.url}: passed over {problem}")
        return states

    def _listing(self) -> dict[str, Entry]:
        return self._asking("cannot be read", self._backend.listing)

    def _states(self, listing: Mapping[str, Entry]) -> tuple[list[MirrorState], list[str]]:
        """Return the steps that count, newest first, and what is wrong with the others."""
        states, problems = [], []
        commits = [name for name in listing if COMMIT.fullmatch(name)]
        for name in sorted(commits, key=lambda name: (int(name.split("-")[1]), name), reverse=True):
            try:
                size = listing[name].size
                if not 0 < size <= MAX_COMMIT_BYTES:
                    raise Damaged(f"{name} has {size} bytes, expected 1 to {MAX_COMMIT_BYTES}")
                states.append(parse_commit(name, self._read(name, 0, size)))
            except Damaged as damage:
                problems.append(str(damage))
        return states, problems

    def _read(self, name: str, offset: int, length: int) -> bytes:
        return self._asking("cannot be read", lambda: self._backend.read(name, offset, length))

    def _asking(self, what: str, work: Callable[[], _Result]) -> _Result:
        """Return the result of `work`, turning whatever a client library raises into one sentence."""
        try:
            return work()
        except Exception as error:  # of four libraries, and of those that they stand on
            raise MirrorError(f"mirror {self.url} {what}: {_words(error)}", _is_lasting(error)) from error

    def _retrying(self, work: Callable[[], _Result]) -> _Result:
        """Return the result of `work`, which goes on from what stands; tried again after each of `RETRY_SECONDS`."""
        for seconds in RETRY_SECONDS:
            try:
                return work()
            except MirrorError as error:
                if error.lasting:
                    raise
            time.sleep(seconds)
        return work()

    # -- uploading -------------------------------------------------------------------------------------------

    def upload(self, checkpoint: Checkpoint, extras: Mapping[str, Path]) -> None:
        """Make `checkpoint`, with what `extras` hold now, the newest step of the mirror; older ones then go.

        Args:
            extras: by name, of `mirror_state.EXTRAS`; those whose file is missing are left out. A history that grows
                meanwhile is taken to the last whole line that it had at the start.

        Raises:
            MirrorError: it did not work, the checkpoint is damaged, or the mirror holds a newer step or another run;
                the newest step that was there before is still there, or the new one already.
        """
        try:
            state, sources = describe(checkpoint, extras)
        except OSError as error:
            raise MirrorError(
                f"step {checkpoint.step} was not mirrored: {files.reason(error)}", True
            ) from error
        except Damaged as damage:
            raise MirrorError(f"step {checkpoint.step} was not mirrored: {damage}", True) from None
        self._retrying(lambda: self._upload(state, sources))

    def _upload(self, state: MirrorState, sources: Mapping[str, Source]) -> None:
        """Do what is missing of an upload, in its order: data, the commit, removals."""
        name, commit = state.commit()
        listing = self._listing()
        self._refuse_other(self._states(listing)[0], state)
        old = [other for other in listing if COMMIT.fullmatch(other) and other != name]
        folders = sorted({other.partition("/")[0] for other in listing if "/" in other} - {state.folder})
        if not self._stands(listing, name, commit):
            self._put(listing, sources)
            self._asking("could not be written", lambda: self._backend.publish(name, commit, old, folders))
        elif old or folders:
            # A commit that counts is never written again: cut short, that would leave none.
            self._asking("could not be written", lambda: self._backend.remove(old, folders))

    def _put(self, listing: Mapping[str, Entry], sources: Mapping[str, Source]) -> None:
        """Send the files that do not stand yet, and see that they do."""
        missing = {
            name: source for name, source in sources.items() if not self._stands(listing, name, source)
        }
        if not missing:
            return
        self._asking("could not be written", lambda: self._backend.put(missing))
        listing = self._listing()
        for name, source in missing.items():
            if not self._stands(listing, name, source):
                found = f"{listing[name].size} bytes" if name in listing else "nothing"
                raise MirrorError(
                    f"mirror {self.url} does not hold {name} as it was sent: {found} there, expected {source.size} "
                    f"bytes with SHA-256 {source.sha256}"
                )

    def _stands(self, listing: Mapping[str, Entry], name: str, source: Source) -> bool:
        entry = listing.get(name)
        return entry is not None and self._asking(
            "cannot be read", lambda: self._backend.holds(name, entry, source)
        )

    def _refuse_other(self, standing: list[MirrorState], new: MirrorState) -> None:
        for state in standing:
            if difference := other_run(state.run, new.run):
                raise MirrorError(
                    f"mirror {self.url} holds another run ({difference}) and was left alone; give another --mirror",
                    lasting=True,
                )
            if state.step > new.step:
                raise MirrorError(
                    f"mirror {self.url} holds step {state.step}, newer than {new.step}, and was left alone",
                    lasting=True,
                )

    # -- downloading -----------------------------------------------------------------------------------------

    def download(self, state: MirrorState, checkpoints_folder: Path, run_folder: Path) -> Path:
        """Fetch a step as `checkpoints_folder/step-N`, verified and durable before it has that name.

        The extras go into `run_folder` where they are missing; a history that is the beginning of the mirrored one is
        replaced by it.

        Raises:
            MirrorError: it cannot be reached, there is no space, or what came differs from what was stored.
        """
        target = checkpoints_folder / f"step-{state.step:08d}"
        # The store takes away what is called so when it is opened.
        temporary = checkpoints_folder / f".tmp-mirror-{target.name}"
        try:
            files.make_folders(checkpoints_folder)
            self._check_room(state, target)
            files.remove_tree(temporary)
            files.make_folder(temporary)
            for name, stored in state.files.items():
                self._fetch(stored, temporary / name)
            self._verify(state, temporary)
            files.sync_folder(temporary)
            # First the extras: a checkpoint that stands is not fetched again, and its history never would be.
            for name, stored in state.extras.items():
                self._restore_extra(stored, run_folder / name)
            files.rename(temporary, target)
            files.sync_folder(checkpoints_folder)
        except OSError as error:
            raise MirrorError(
                f"step {state.step} of mirror {self.url} could not be written to {checkpoints_folder}: "
                f"{files.reason(error)}",
                lasting=True,
            ) from error
        finally:
            with contextlib.suppress(OSError):
                files.remove_tree(temporary)
        return target

    def _check_room(self, state: MirrorState, target: Path) -> None:
        if os.path.lexists(target):
            raise MirrorError(f"{target} is in the way of that step of mirror {self.url}; move it away", True)
        needed, free = state.total_bytes, files.free_bytes(target.parent)
        if needed > free:
            raise MirrorError(
                f"step {state.step} of mirror {self.url} takes {needed / 1e6:.1f} MB, and the disk of "
                f"{target.parent} has {free / 1e6:.1f} MB free",
                lasting=True,
            )

    def _fetch(self, stored: StoredFile, path: Path) -> None:
        """Write what is stored to the new file `path`, durably.

        Raises:
            MirrorError: it cannot be reached, or its bytes are others.
            OSError: it cannot be written.
        """

        def read(name: str, offset: int, length: int) -> bytes:
            return self._retrying(lambda: self._read(name, offset, length))

        digest, size = hashlib.sha256(), 0
        with files.DurableFile(path) as file:
            for chunk in read_file(read, stored.stored, stored.size):
                size += len(chunk)
                digest.update(chunk)
                file.write(chunk)
        problem = ""
        if size != stored.size:
            found = f"more than {stored.size}" if size > stored.size else str(size)
            problem = f"{found} bytes, expected {stored.size}"
        elif digest.hexdigest() != stored.sha256:
            problem = f"hash {digest.hexdigest()}, expected {stored.sha256}"
        if problem:
            raise MirrorError(f"{stored.stored} on mirror {self.url} has {problem}", lasting=True)

    def _verify(self, state: MirrorState, folder: Path) -> None:
        try:
            manifest = verify_folder(folder)
            if manifest.step != state.step or {*manifest.files, NAME} != set(state.files):
                raise Damaged(f"{NAME} is of another step, or of other files")
        except Damaged as damage:
            raise MirrorError(f"step {state.step} on mirror {self.url} is not good: {damage}", True) from None

    def _restore_extra(self, stored: StoredFile, target: Path) -> None:
        """Put an extra in its place unless one is there that is not merely its beginning."""
        files.make_folders(target.parent)
        if target.exists() and not target.name.endswith(".jsonl"):
            return
        temporary = target.with_name(f".{target.name}.mirror.tmp")
        try:
            files.remove_file(temporary)
            self._fetch(stored, temporary)
            if target.exists() and not _is_beginning(target, temporary):
                say(f"{target.name} here differs from the one on mirror {self.url}; the one here stays")
                return
            files.rename(temporary, target)
            files.sync_folder(target.parent)
        finally:
            with contextlib.suppress(OSError):
                files.remove_file(temporary)


def _is_beginning(shorter: Path, longer: Path) -> bool:
    """Return whether the whole lines of `shorter` stand at the beginning of `longer`."""
    mine = b"".join(files.read_chunks(shorter))
    mine = mine[: mine.rfind(b"\n") + 1]
    return files.read_start(longer, len(mine)) == mine


def _words(error: BaseException) -> str:
    """Return one line of what a client library says, without what may follow a URL's question mark."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\?\S*", "", lines[0])[:300] if lines else type(error).__name__
    if status == 401 or status == 403:
        return f"access is refused ({text}); check the credentials"
    if isinstance(error, PermissionError):
        return f"access is refused ({text}); check the credentials and their rights"
    return text


def _is_lasting(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or getattr(
        getattr(error, "response", None), "status_code", None
    ) in (401, 403)


def restore_from_mirror(
    mirror: Mirror,
    store_folder: Path,
    run_folder: Path,
    newest_local_step: int | None,
    identity: Mapping[str, Any] | None = None,
) -> Path | None:
    """Return the checkpoint folder fetched from the mirror, or None where the local one is as new.

    Args:
        newest_local_step: of the newest local checkpoint that verifies; None: there is none.
        identity: what is known of this run, by the keys of `mirror_state.IDENTITY`.

    Raises:
        UserError: the mirror holds another run; or there is no local checkpoint and the mirror cannot be read, for
            that never becomes a fresh start over a mirrored run.
    """
    here = "no checkpoint" if newest_local_step is None else f"step {newest_local_step}"
    try:
        states = mirror.states()
    except MirrorError as error:
        _without_mirror([error], here, newest_local_step)
        return None
    problems = []
    for state in states:
        if difference := other_run(state.run, identity or {}):
            raise UserError(
                f"--mirror {mirror.url} holds step {state.step} of another run ({difference}); give another --mirror, "
                "or the data and --output-dir of that run"
            )
    for state in states:
        if newest_local_step is not None and state.step <= newest_local_step:
            break
        say(
            f"fetching step {state.step} ({state.total_bytes / 1e6:.1f} MB) from mirror {mirror.url}: "
            f"there is {here} in {store_folder}"
        )
        try:
            return mirror.download(state, store_folder, run_folder)
        except MirrorError as error:
            problems.append(error)
    if problems:
        _without_mirror(problems, here, newest_local_step)
    return None


def _without_mirror(problems: list[MirrorError], here: str, newest_local_step: int | None) -> None:
    if newest_local_step is None:
        raise UserError(
            f"{problems[0]}; there is no local checkpoint to go on from: start again once the mirror can be read, or "
            "without --mirror to train afresh"
        )
    for problem in problems:
        say(f"{problem}; going on from {here} on this disk")


def open_mirror(url: str) -> Mirror:
    """Return the mirror at `url`; nothing is asked of the network yet.

    Args:
        url: `hf://OWNER/REPO`, an fsspec URL such as `s3://BUCKET/FOLDER` or `file:///FOLDER`, or a folder.

    Raises:
        UsageError: it is not a place that can be written to.
        UserError: a package or the credentials for it are missing.
    """
    return Mirror(url, open_backend(url))
