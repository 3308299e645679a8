"""The same exp, log and tanh in every process: MKL's choice of kernels made on one thread, before two can meet in it.

PyTorch on x86 computes these with MKL's vector math, which looks the processor up at the first call in a process. Where
that call runs on several threads, one of them may go on before the others have finished looking, and compute its part with
a kernel of low accuracy: 5e-5 off in tanh, 8e-4 in exp, once in 200 processes or so (docs/experiments.md). GPT-2's
activation is such a call, so a run's first step, or a resumed one's, came out otherwise now and then.
"""

from __future__ import annotations

import torch

_FUNCTIONS = (torch.tanh, torch.exp, torch.log, torch.sin, torch.cos, torch.erf, torch.sqrt)


def settle_vector_math() -> None:
    """Call MKL's vector math on one element, which is never divided among threads. Takes under a millisecond."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for function in _FUNCTIONS:
            function(one)
