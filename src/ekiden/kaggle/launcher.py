"""The one source file of a leg: `leg.py` with its settings and the whole package inside, below Kaggle's 1 MB.

A push uploads exactly one text file, and siblings are not shipped; so Ekiden itself travels in it, compressed.
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

MAX_BYTES = 1_000_000
_SETTINGS, _PACKAGE = "SETTINGS: dict[str, Any] = {}\n", 'PACKAGE = ""\n'


def render(settings: dict[str, Any]) -> str:
    """Return the source of a leg with `settings` (see `relay.leg_settings`)."""
    source = (resources.files("ekiden") / "kaggle" / "leg.py").read_text(encoding="utf-8")
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
            if path.suffix in (".py", ".yaml"):
                name = str(Path("ekiden") / path.relative_to(root))
                archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_LZMA)
    return base64.b85encode(buffer.getvalue()).decode()
