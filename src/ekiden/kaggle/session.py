"""What every step of a leg stands on: its clock, where Kaggle puts things, and what the machine is.

`leg`, `inputs` and the notebook (`interactive`) start from here. Nothing but the standard library is needed: it runs
before anything that Kaggle's image may lack has been installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
"""The leg's first moment, but for what unpacking the package took: its deadline counts from here."""
ROOT = Path(os.environ.get("EKIDEN_KAGGLE_ROOT", "/kaggle"))
"""Where `input` and `working` are; another place is named only where Kaggle is rehearsed on one's own machine."""


class Ended(Exception):
    """The leg is over before or without training; the two arguments are its status and the reason."""


def say(text: str) -> None:
    """Print a line at once: what is buffered when a session is killed is never seen."""
    print(f"[{time.monotonic() - BEGAN:7.0f}s] {text}", flush=True)


def read_json(path: Path) -> Any:
    """Return the JSON value in a file, None where it is missing or is none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    return None


def scratch_folder(root: Path) -> Path:
    """Return a folder whose content is not kept as output."""
    path = (root / "tmp" if root != Path("/kaggle") else Path("/tmp")) / "ekiden"
    path.mkdir(parents=True, exist_ok=True)
    return path


def gpu_names() -> list[str]:
    """Return the GPUs that `nvidia-smi -L` lists."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.startswith("GPU ")]


def require_gpus(count: int) -> None:
    """Say what GPUs there are.

    Raises:
        Ended: fewer than `count`. Kaggle falls back to a CPU without a word, and a CPU would take the whole session.
    """
    names = gpu_names()
    say("; ".join(names) or "no GPU")
    if len(names) < count:
        raise Ended("no-gpu", f"{len(names)} GPU{'s' * (len(names) != 1)} found, {count} needed")


NEEDED = "click filelock fsspec google.protobuf huggingface_hub numpy orjson psutil pyarrow yaml safetensors".split()
NEEDED += "sentencepiece tokenizers torch tqdm transformers xxhash".split()
"""The package's dependencies, but for those below."""
DISTRIBUTIONS = {"yaml": "pyyaml", "google.protobuf": "protobuf"}
SPARED = {"isal"}
"""Dependencies without which everything works, more slowly: the images lack it, and a session may have no network."""


def install_missing(modules: Iterable[str] = NEEDED) -> list[str]:
    """Install the modules that the image lacks, each alone: nothing that the image has is replaced.

    Raises:
        Ended: pip failed.
    """
    missing = [DISTRIBUTIONS.get(name, name) for name in modules if not _found(name)]
    if missing:
        say(f"installing {', '.join(missing)}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Ended("failed", f"pip install {' '.join(missing)} failed: {done.stderr.strip()[-300:]}")
    return missing


def _found(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # of a module's parent
        return importlib.util.find_spec(module) is not None
    return False
