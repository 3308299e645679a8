"""A folder becomes private Kaggle datasets: packed, uploaded part by part, and compared with what Kaggle then lists.

Any folder or file: token shards, text, a tokenizer, a checkpoint, a wheel, `final_model/`. A push that 'succeeded' may
have lost files, and a dataset over the quota is gone without a word; so nothing counts before Kaggle lists every file with
its size and gives back the manifest. A part whose content Kaggle already has is not sent again.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ekiden.errors import UsageError, UserError
from ekiden.kaggle.client import Kaggle, KaggleError
from ekiden.kaggle.inputs import PACK_MANIFEST
from ekiden.kaggle.pack import CHUNK_BYTES, Pack, plan_pack, write_part
from ekiden.progress import human_duration, say

READY_SECONDS = 3600.0
"""How long Kaggle may take to process one part."""
POLL_SECONDS = 10.0


def slug_of(text: str) -> str:
    """Return `text` as Kaggle writes a title in addresses."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def check_name(name: str, flag: str = "--name", longest: int = 40) -> str:
    """Return `name` after checking that Kaggle takes it.

    Raises:
        UsageError: it does not.
    """
    if slug_of(name) != name or not 4 <= len(name) <= longest:
        raise UsageError(
            f"{flag} must be 4 to {longest} small letters, digits and single hyphens, not {name!r}"
            + (f"; {slug_of(name)!r} would do" if 4 <= len(slug_of(name)) <= longest else "")
        )
    return name


def upload(
    root: Path,
    name: str,
    kaggle: Kaggle,
    *,
    max_part_bytes: int = 5_000_000_000,
    chunk_bytes: int = CHUNK_BYTES,
    staging: Path | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Upload `root` as the private datasets NAME-1, NAME-2, ...; run again, it goes on where it was.

    Args:
        staging: where one part at a time is written; None: a folder in the system's temporary one. The same place
            is needed to go on with a broken upload.

    Returns:
        The datasets (owner/slug), verified.

    Raises:
        UserError: nothing to upload, too much of it, or Kaggle did not take it.
    """
    check_name(name)
    pack = plan_pack(root, name, max_part_bytes, chunk_bytes)
    staging = staging or Path(tempfile.gettempdir()) / "ekiden-kaggle" / name
    refs = []
    say(f"{root}: {pack.total_bytes / 1e6:,.2f} MB in {pack.parts} part(s)")
    for part in range(1, pack.parts + 1):
        ref = f"{kaggle.user}/{name}-{part}"
        _upload_part(pack, part, ref, kaggle, staging / str(part), wait)
        refs.append(ref)
    shutil.rmtree(staging, ignore_errors=True)
    return refs


def _upload_part(
    pack: Pack, part: int, ref: str, kaggle: Kaggle, folder: Path, wait: Callable[[float], None]
) -> None:
    exists = kaggle.dataset_ready(ref)
    if exists is not None:
        problem = difference(pack, part, ref, kaggle) if exists else _await(pack, part, ref, kaggle, wait)
        if not problem:
            say(f"{ref}: unchanged")
            return
        say(f"{ref}: {problem}; uploading it anew")
    for attempt in (1, 2):
        write_part(pack, part, folder)
        kaggle.upload(ref, f"{pack.manifest['name']} {part}", folder, exists=exists is not None)
        problem = _await(pack, part, ref, kaggle, wait)
        if not problem:
            break
        if attempt == 2:
            raise KaggleError(
                f"{ref}: {problem}, twice; look at it on kaggle.com and run the same command again"
            )
        say(f"{ref}: {problem}; uploading it anew")
        exists = kaggle.dataset_ready(ref)
    shutil.rmtree(folder)
    say(f"{ref}: uploaded and verified")


def _await(pack: Pack, part: int, ref: str, kaggle: Kaggle, wait: Callable[[float], None]) -> str:
    """Wait until Kaggle shows the new version; return what is wrong with it, or an empty text.

    `ready` may still be said of the version before, so what counts is the manifest.
    """
    waited, problem = 0.0, "it does not appear (is the account over its quota?)"
    settled = 0
    while waited < READY_SECONDS and settled < 6:
        ready = kaggle.dataset_ready(ref)
        if ready:
            problem = difference(pack, part, ref, kaggle)
            if not problem:
                return ""
            settled += 1
        elif ready is None:
            settled += 1
        wait(POLL_SECONDS)
        waited += POLL_SECONDS
    return problem if settled else f"not ready after {human_duration(waited)}"


def difference(pack: Pack, part: int, ref: str, kaggle: Kaggle) -> str:
    """Return how a dataset differs from a part of `pack`; empty where it does not."""
    expected, listed = pack.files_of_part(part), kaggle.dataset_files(ref)
    missing = sorted(name for name in expected if name not in listed)
    if missing:
        return f"{', '.join(missing[:3])} is not there"
    wrong = sorted(name for name in expected if listed[name] != expected[name])
    if wrong:
        return f"{wrong[0]} has {listed[wrong[0]]} bytes, expected {expected[wrong[0]]}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = json.loads(kaggle.dataset_file(ref, PACK_MANIFEST, Path(folder)).read_bytes())
        except (OSError, ValueError):
            return f"{PACK_MANIFEST} cannot be read"
    return "" if found.get("fingerprint") == pack.manifest["fingerprint"] else "it holds another version"


def manifest_of(refs: list[str], kaggle: Kaggle) -> dict[str, Any]:
    """Return the manifest of the pack that lies in datasets `refs`.

    Raises:
        UsageError: one is not owner/name. KaggleError: one is missing or holds no pack, or they are parts of different
            ones.
    """
    found: dict[str, str] = {}
    manifest: dict[str, Any] = {}
    for ref in refs:
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", ref):
            raise UsageError(f"--corpus must be owner/name, or several with commas between, not {ref!r}")
        if PACK_MANIFEST not in kaggle.dataset_files(ref):
            raise KaggleError(
                f"dataset {ref} is not there for {kaggle.user}, or not packed; use `ekiden kaggle corpus upload`"
            )
        with tempfile.TemporaryDirectory() as folder:
            manifest = json.loads(kaggle.dataset_file(ref, PACK_MANIFEST, Path(folder)).read_bytes())
        found[ref] = str(manifest["fingerprint"])
    if len(set(found.values())) != 1 or len(found) != manifest["parts"]:
        raise KaggleError(
            f"--corpus {','.join(refs)} are not the {manifest['parts']} parts of one corpus; "
            "give all that `corpus upload` printed"
        )
    return manifest


def shards_fingerprint(refs: list[str], kaggle: Kaggle) -> str:
    """Return the fingerprint of the token shards that lie in datasets `refs`.

    Raises:
        UserError: they are no token shards, or as for `manifest_of`: better now than in a session on Kaggle.
    """
    manifest = manifest_of(refs, kaggle)
    if not any(record["path"] == "dataset.json" for record in manifest["files"]):
        raise UserError(
            f"--corpus {','.join(refs)} holds no token shards; give `kaggle corpus upload` the output of "
            "`ekiden preprocess`, or --tokenizer"
        )
    return str(manifest["fingerprint"])
