"""How often a process's first tanh, exp or log differs from its second: the vector math library looking the processor up.

    python benchmarks/first_call.py [--forks 2000] [--threads 3] [--settled]

Forks fresh processes that have computed nothing, lets each call one function twice on the same 3,072 numbers, and counts
those whose two results differ. `--settled` imports ekiden.modeling first, which makes the first calls on one element.
Needs os.fork and, to show anything, an idle machine. The last line is one JSON object: per function the count and the
largest absolute difference.
"""

from __future__ import annotations

import argparse
import json
import os
import struct

import torch

FUNCTIONS = {"tanh": torch.tanh, "log": torch.log, "exp": torch.exp}


def difference(name: str, threads: int) -> float:
    """Return the largest difference between the first and the second call in a new process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        first, second = FUNCTIONS[name](VALUES), FUNCTIONS[name](VALUES)
        os.write(
            writing, struct.pack("d", 0.0 if torch.equal(first, second) else (first - second).abs().max())
        )
        os._exit(0)
    os.close(writing)
    answer = os.read(reading, 8)
    os.close(reading)
    os.waitpid(child, 0)
    return float(struct.unpack("d", answer)[0])


VALUES = torch.linspace(0.1, 3.9, 3072)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forks", type=int, default=2000, help="processes a function")
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--settled", action="store_true")
    options = parser.parse_args()
    if options.settled:
        import ekiden.modeling  # noqa: F401
    result: dict[str, object] = {
        "forks": options.forks,
        "threads": options.threads,
        "settled": options.settled,
    }
    for name in FUNCTIONS:
        found = [difference(name, options.threads) for _ in range(options.forks)]
        result[name] = {"differing": sum(value != 0 for value in found), "largest": max(found)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
