"""C sources compiled once for a machine and kept in the user's cache folder.

`tokens.kernel` (encoders) and `modeling.kernels` (attention, softmax) call `compiled` at their first use. Both work as well
without a compiler, only slower.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPILE_SECONDS = 60


def allowed() -> bool:
    """Return whether native code may be used: not with EKIDEN_KERNEL=0, nor on processors it was never tried on."""
    return os.environ.get("EKIDEN_KERNEL") != "0" and platform.machine() in ("x86_64", "aarch64", "arm64")


def find_compiler() -> str | None:
    """Return the path of a C compiler, or None."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def compiled(
    compiler: str, sources: Sequence[Path], options: Sequence[str], libraries: Sequence[str] = ()
) -> Path:
    """Return the shared library of `sources`, compiling it where this machine has none.

    Its name holds the hash of sources, options, compiler and kind of machine. Headers among the sources are only hashed.

    Args:
        libraries: linker options, behind the sources.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled or kept.
    """
    source = b"".join(path.read_bytes() for path in sources)
    what = [*options, *libraries, os.path.realpath(compiler), platform.machine(), platform.system()]
    name = hashlib.sha256(source + " ".join(what).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ekiden"
    path = folder / f"kernel-{name[:24]}.so"
    if path.exists() and path.stat().st_uid == os.getuid():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / "kernel.so"
        files = [str(path) for path in sources if path.suffix == ".c"]
        subprocess.run(
            [compiler, *options, *files, *libraries, "-o", str(made)],
            check=True, capture_output=True, timeout=COMPILE_SECONDS,
        )  # fmt: skip
        made.replace(path)  # at once: another process may be loading it
    return path
