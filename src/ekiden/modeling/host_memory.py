"""The C library told to keep freed memory for the next step, where training runs on a CPU.

glibc gives every block above 32 MB, and the end of its heap, back to the system as soon as it is free, and gets it again,
page by page and filled with zeros, in the next microbatch: 120,000 page faults a step of `gpt2-10m` (8 x 512 tokens, 2
threads), 0.12 of 2.24 s. A GPU's memory is kept by PyTorch's own allocator; this is the same for a CPU.

`training.start` calls `keep_freed_memory` once; `training.memory` calls `give_back` where memory ran out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1
_ASKED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Take large blocks from the heap and never give its end back; return whether the C library has such settings.

    mallopt(3). Nothing is done where the environment has settings of its own for the C library's memory.
    """
    if any(name in os.environ for name in _ASKED):
        return False
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def give_back() -> None:
    """Return all free pages to the system (malloc_trim(3)): somebody else may need them."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """Return a function of glibc's, or None where the C library has no such one (macOS, musl)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        return getattr(ctypes.CDLL(None), name)
    return None
