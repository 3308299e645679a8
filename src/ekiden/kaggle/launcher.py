"""What is pushed for a leg: one source file, `script.py` with its settings and the whole package inside, and its metadata.

A push uploads exactly one text file below 1 MB, and siblings are not shipped; so Ekiden itself travels in it, compressed.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

from ekiden.kaggle.state import Attempt, RelayState

MAX_BYTES = 1_000_000
WALL_SECONDS = 12 * 3600
GRACE_SECONDS = 600
OUTPUT_BYTES = 20_000_000_000
_SETTINGS, _PACKAGE = "SETTINGS: dict[str, Any] = {}\n", 'PACKAGE = ""\n'


def render(settings: dict[str, Any]) -> str:
    """Return the source of a leg with `settings` (see `leg_settings`)."""
    source = (resources.files("ekiden") / "kaggle" / "script.py").read_text(encoding="utf-8")
    assert source.count(_SETTINGS) == 1 and source.count(_PACKAGE) == 1
    text = json.dumps(settings, ensure_ascii=True)
    source = source.replace(_SETTINGS, f"SETTINGS: dict[str, Any] = json.loads({text!r})\n")
    source = source.replace(_PACKAGE, f"PACKAGE = {packed_package()!r}\n")
    assert len(source.encode()) < MAX_BYTES, f"the leg has {len(source.encode())} bytes"
    return source


@functools.cache
def packed_package() -> str:
    """Return the installed package as a zip archive in base 85: the same bytes for the same files."""
    buffer = io.BytesIO()
    root = Path(str(resources.files("ekiden")))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".yaml", ".c", ".h"):
                name = str(Path("ekiden") / path.relative_to(root))
                archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_LZMA)
    return base64.b85encode(buffer.getvalue()).decode()


def leg_settings(state: RelayState, attempt: Attempt) -> dict[str, Any]:
    """Return the settings that travel in a leg's file; nothing secret is among them."""
    settings = state.settings
    return {
        "relay": state.id,
        "leg": attempt.leg,
        "nonce": attempt.nonce,
        "datasets": settings.corpus,
        "fingerprint": settings.fingerprint,
        "previous": attempt.source["ref"] if attempt.source else "",
        "expected": attempt.source,
        "recipe": settings.recipe,
        "gpus": settings.gpus,
        "seconds": attempt.seconds,
        "grace": GRACE_SECONDS,
        "output_bytes": OUTPUT_BYTES,
    }


def write_push(folder: Path, state: RelayState, attempt: Attempt) -> None:
    """Write what the client pushes: one source file and its metadata."""
    (folder / "leg.py").write_text(render(leg_settings(state, attempt)), encoding="utf-8")
    metadata = {
        "id": state.ref(attempt.slug),
        "title": attempt.slug.replace("-", " "),
        "code_file": "leg.py",
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": state.settings.gpus > 0,
        "enable_internet": True,
        "dataset_sources": state.settings.corpus,
        "kernel_sources": [attempt.source["ref"]] if attempt.source else [],
        "docker_image_pinning_type": "original",
    }
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata, indent=1))
