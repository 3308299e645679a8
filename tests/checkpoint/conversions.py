"""Checkpoints to convert, and a process of little memory to convert them in; for the tests of the three formats."""

from __future__ import annotations

import atexit
import functools
import math
import shutil
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import little_memory
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from forked import Served

MEGABYTE = 1 << 20
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
]


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def every_bit(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a tensor of random bits, NaNs of every kind among them; bools of 0 and 1."""
    generator = torch.Generator().manual_seed(len(str(dtype)))
    size = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def trained() -> dict[str, Any]:
    """Return what a plain training script saves: model, AdamW and schedule of a small network, and loose values."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(3):
        model(torch.arange(10)).pow(2).sum().backward()
        optimizer.step()
        scheduler.step()
    return {
        "step": 3,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "loss": math.inf,
        "notes": ["नदी", "न्हंय", '"\\\n\0', ""],
    }


def odd() -> dict[Any, Any]:
    """Return one of everything that a checkpoint may hold."""
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    state: OrderedDict[str, Any] = OrderedDict(b=torch.ones(2), a=torch.zeros(1))
    state._metadata = OrderedDict({"": {"version": 1}, "x": {"version": 2}})  # type: ignore[attr-defined]
    return {
        "dtypes": {str(dtype): every_bit(dtype, 7, 3) for dtype in DTYPES},
        "empty": [torch.empty(0), torch.empty(3, 0, 2)],
        "scalar": torch.tensor(math.nan),
        "tied": [base, base],
        "views": [base.t(), base[5:9, 3:7], base[:, 4], torch.ones(1).expand(4, 5)],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "grad": torch.ones(2, requires_grad=True),
        "ordered": state,
        "floats": [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1, 1e308],
        "integers": [0, -1, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1, True, False],
        "tuple": (1, (2.0, [None, "x"]), ()),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "bytes": bytes(range(256)),
        "set": {1, "a", (2, 3)},
        3: {None: 1, 2.5: 2, (1, 2): 3, True: 4},
        "__ekiden__": {"__tuple__": [1], "dtype": 1, "shape": 2, "data": 3},
        "looks like a tensor": {"dtype": "float32", "shape": [1], "data": "AAAA"},
        "text": 'ab"\\é\ud800' * 1000,
        "numbers": list(range(3000)),
        "k" * 2000: 1,
    }


@functools.cache
def _little_memory() -> Served:
    folder = Path(tempfile.mkdtemp(prefix="ekiden-little-memory-"))
    process = Served(little_memory.begin, folder / "log", folder, method="spawn")
    atexit.register(lambda: (process.close(), shutil.rmtree(folder)))
    return process


def convert_in_little_memory(source: Path, target: Path, megabytes: int = 400) -> Done:
    """Run `ekiden checkpoint convert` in a process that may have so much address space, and no more."""
    arguments = ["checkpoint", "convert", str(source), str(target)]
    return Done(*_little_memory().ask((arguments, megabytes)))


def refusal(source: Path, tmp_path: Path) -> str:
    """Return the one sentence with which converting `source` is refused, in little memory, leaving nothing behind."""
    before = sorted(tmp_path.iterdir())
    done = convert_in_little_memory(source, tmp_path / "out.json")
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith("ekiden: ") and done.stderr.count("\n") == 1, done.stderr
    assert sorted(tmp_path.iterdir()) == before
    return done.stderr
