"""The first vectorised function of a process gives what every later one gives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FORKS = """
import os, sys
import torch
if sys.argv[2] == "settled":
    import ekiden.modeling
values, wrong = torch.linspace(0.1, 3.9, 4096), 0
for number in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(3)
        function = (torch.tanh, torch.exp, torch.log)[number % 3]
        os._exit(not torch.equal(function(values), function(values)))
    wrong += os.waitpid(child, 0)[1] != 0
print(wrong)
"""
"""Fresh processes, as far as MKL is concerned: nothing has been computed before the fork."""


def count_wrong(forks: int, settled: str) -> int:
    """Return in how many of `forks` processes the first call differed from the second."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", FORKS, str(forks), settled]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


def test_a_settled_process_begins_right():
    assert count_wrong(6, "settled") == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_many_settled_processes_begin_right():
    """Not settled, about 1 of 200 begins wrong on an idle machine of 4 cores, fewer on a busy one."""
    assert count_wrong(1500, "settled") == 0
