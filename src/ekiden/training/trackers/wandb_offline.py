"""What wandb's offline files hold: a killed process loses up to 32 KB of them, so a resumed run has to look.

The files are logs in LevelDB's format: a header of 7 bytes, then blocks of 32 KiB of records, each with a checksum,
a length and whether it is whole or the first, middle or last part of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = 7
WHOLE, LAST = 1, 4


def logged_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what `run.log` was given, as far as it reached the file."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    data, position, parts = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        end = position + HEADER + length
        if kind == 0 or end > len(data):
            return  # the rest was never written
        parts += data[position + HEADER : end]
        position = end
        if kind in (WHOLE, LAST):
            record = messages.Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                yield {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}


def logged_steps(folder: Path, run_id: str) -> dict[str, set[int]]:
    """Return the steps of each kind of record in all offline files of a run under `folder`."""
    steps: dict[str, set[int]] = {"train": set(), "eval": set()}
    for path in sorted(folder.glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")):
        for row in logged_rows(path):
            for kind, found in steps.items():
                if isinstance(row.get(f"{kind}/step"), int):
                    found.add(row[f"{kind}/step"])
    return steps
