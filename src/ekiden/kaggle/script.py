"""The one source file of a leg: it unpacks the package that travels inside it and hands over to `ekiden.kaggle.leg`.

A template: `launcher.render` fills in the settings and the package. Whatever happens, it ends with status 0 and leaves a
`result.json`: Kaggle throws the output of a failed session away.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import tempfile
import traceback
import zipfile
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {}
PACKAGE = ""


def go(folder: str) -> None:
    """Unpack the package into `folder`, for this process and those that it starts, and go the leg."""
    zipfile.ZipFile(io.BytesIO(base64.b85decode(PACKAGE))).extractall(folder)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    from ekiden.kaggle import leg
    from ekiden.kaggle.session import ROOT

    leg.main(SETTINGS, ROOT)


def main() -> None:
    """Go the leg; where even its own package does not start, say so in its verdict."""
    try:
        with tempfile.TemporaryDirectory(prefix="ekiden-") as folder:
            go(folder)
    except BaseException as error:
        traceback.print_exc()
        working = Path(os.environ.get("EKIDEN_KAGGLE_ROOT", "/kaggle")) / "working"
        if not (working / "result.json").exists():
            verdict = {name: SETTINGS.get(name) for name in ("relay", "leg", "nonce")}
            verdict |= {"status": "failed", "reason": f"{type(error).__name__}: {error}", "checkpoint": None}
            (working / "result.json").write_text(json.dumps({**verdict, "step": 0, "tokens": 0}))


if __name__ == "__main__":
    main()
