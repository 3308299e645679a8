"""The compiled encoders of `unigram_search` and `bpe_merges` (`native/`), where there is a C compiler.

Compiled once for a machine, at the first use (about a second), into the user's cache folder, under a name that
holds the hash of the source, the compiler and the kind of machine; never with options for one processor, so that a home
folder may be shared. Without a compiler, or with EKIDEN_KERNEL=0, everything works as well and gives the same ids, only
slower: `library` is None.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from pathlib import Path

import numpy as np

from ekiden.native_code import allowed, compiled, find_compiler

SOURCES = sorted(Path(__file__).with_name("native").glob("*.[ch]"))
OPTIONS = ["-O3", "-shared", "-fPIC", "-std=c11", "-ffp-contract=off", "-fno-fast-math"]

_I8, _I32, _I64, _U64 = (
    np.ctypeslib.ndpointer(kind, flags="C_CONTIGUOUS") for kind in (np.uint8, np.int32, np.int64, np.uint64)
)
_F32 = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
_NUMBER, _INT, _POINTER, _BYTES = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_char_p


_FUNCTIONS = {
    "unigram_new": (
        _POINTER,
        [_BYTES, _I64, _I32, _F32, _INT, ctypes.c_float, _INT, _I32, _I8, ctypes.c_float, _NUMBER],
    ),
    "unigram_free": (None, [_POINTER]),
    "unigram_encode": (_NUMBER, [_POINTER, _BYTES, _I64, _NUMBER, _U64, _I32, _I64]),
    "bpe_new": (_POINTER, [_BYTES, _I64, _I32, _I32, _I8, _INT, _INT, _I32, _I8, _NUMBER]),
    "bpe_free": (None, [_POINTER]),
    "bpe_encode": (_NUMBER, [_POINTER, _BYTES, _I64, _NUMBER, _U64, _I32, _I64]),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions; None where there is no compiler, or it does not compile them."""
    compiler = find_compiler()
    if compiler is None or not allowed():
        return None
    try:
        found = ctypes.CDLL(str(compiled(compiler, SOURCES, OPTIONS)))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found
