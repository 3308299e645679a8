"""Peak host memory of two ranks in shards: starting, stepping, saving, and loading what was saved.

    python benchmarks/ranks_memory.py [--world 2] [--width 768] [--layers 12] [--parallel fsdp]

Trains a real run of a GPT-2 of about 100M parameters on a CPU, one step and a checkpoint, and then starts it again from
there; each rank writes the resident memory that it had at its highest in each phase (`VmHWM`, reset between phases). On a
GPU the shards, gradients and activations would be on the device; what is gathered for a save is in host memory there too.
The last line is one JSON object; `bytes_per_parameter` is of the highest minus what a rank has with everything imported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))
from common import small_shards
from ranks import run_ranks, signalled

from ekiden.config import TrainConfig, build_config
from ekiden.training import loop, start
from ekiden.training.saving import Saving


def highest() -> int:
    """Return the peak resident bytes since the last call (or the process's start), and begin anew."""
    text = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM"))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(peak) * 1024


def record(path: Path) -> None:
    """Have this process write its peak after starting, stepping and saving, with hooks around those."""
    import psutil

    found: dict[str, int] = {"imported": psutil.Process().memory_info().rss}
    highest()

    def wrapped(place: Any, name: str, phase: str, before: str | None = None) -> None:
        real = getattr(place, name)

        def call(*arguments: Any, **more: Any) -> Any:
            if before:
                found[before] = max(found.get(before, 0), highest())
            result = real(*arguments, **more)
            found[phase] = max(found.get(phase, 0), highest())
            found["parameters"] = max(found.get("parameters", 0), count(arguments, result))
            path.write_text(json.dumps(found))
            return result

        setattr(place, name, call)

    wrapped(loop, "prepare", "starting")
    wrapped(Saving, "save", "saving", before="stepping")
    wrapped(Saving, "write_model", "exporting")


def count(arguments: tuple[Any, ...], result: Any) -> int:
    """Return the parameters of the model, where this is what starts."""
    if isinstance(result, start.Start):
        return sum(p.numel() for p in result.state.model.parameters())
    return 0


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Yield a folder for the run and its checkpoints."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def settings(options: argparse.Namespace, shards: Path, run: Path, save_steps: int) -> TrainConfig:
    """Return the settings of a run of two steps of the shape that was asked for."""
    return build_config(
        "gpt2-10m",
        dataset_path=str(shards),
        output_dir=str(run),
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        max_length=32,
        batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=2,
        save_steps=save_steps,
        eval_steps=0,
        sample_tokens=1,
        num_threads=1,
        report=False,
        precision="fp32",
        parallel=options.parallel,
        optimizer=options.optimizer,
        background_save=False,
    )


def main() -> None:
    """Measure a fresh start and a resumed one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--parallel", default="fsdp", help="fsdp or ddp")
    parser.add_argument("--optimizer", default="adamw", help="adamw or muon")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with folder() as place:
        with contextlib.redirect_stdout(sys.stderr):
            shards = small_shards(place)
        for number, steps in enumerate((1, 2)):
            config = settings(options, shards, place / "run", save_steps=steps)
            fault = signalled(0, count=1) if number == 0 else None

            def hooks(rank: int, fault: Any = fault, number: int = number) -> None:
                record(place / f"peak-{number}-{rank}")
                if fault:
                    fault(rank)

            done = run_ranks(config, options.world, place / f"log-{number}", fault=hooks)
            assert done.completed, done.log[-3000:]
            for rank in range(options.world):
                found = json.loads((place / f"peak-{number}-{rank}").read_text())
                parameters, base = found.pop("parameters"), found.pop("imported")
                per = {phase: round((peak - base) / parameters, 1) for phase, peak in found.items()}
                rows.append(
                    {
                        "start": ("fresh", "resumed")[number],
                        "rank": rank,
                        "parameters": parameters,
                        "imported_mb": base >> 20,
                        "peak_mb": {phase: peak >> 20 for phase, peak in found.items()},
                        "bytes_per_parameter": per,
                    }
                )
                print(rows[-1], flush=True)
    print(json.dumps({"benchmark": "ranks_memory", **vars(options), "cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
