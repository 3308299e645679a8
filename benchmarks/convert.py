"""Checkpoints converted: sizes, seconds and peak memory of `.pt`, JSON and folders, each to each, and every bit compared.

    python benchmarks/convert.py --folder /tmp/convert

For each preset a model with random weights and AdamW moments is written twice: as what a plain training script saves
(`torch.save` of model, optimizer and scheduler), and as a checkpoint folder of a run. Both are converted to JSON and
back, and the folder to `.pt` and back; each conversion is a process of its own, whose peak is the kernel's VmHWM, and the
result is compared with the first file, tensor by tensor. `gemma3-270m` with 262,144 pieces needs 25 GB of disk; what
was compared is removed. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT_RATIO, LIMIT_EXTRA_BYTES = 1.36, 200e6

CONVERT = """
import atexit, sys
from pathlib import Path
def peak():
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    print(int(line.split()[1]) * 1024)
atexit.register(peak)
from ekiden.cli import main
main(["checkpoint", "convert", *sys.argv[1:]])
"""

MAKE = """
import sys
from pathlib import Path
import torch
from ekiden.checkpoint.folder import write_folder
from ekiden.config import build_config
from ekiden.modeling.build import build_model
preset, vocabulary, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
model = build_model(build_config(preset), vocabulary, 0, 2, 1, seed=1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(2)
for parameter in model.parameters():
    optimizer.state[parameter] = {
        "step": torch.tensor(1000.0),
        "exp_avg": torch.randn(parameter.shape, generator=generator) * 1e-3,
        "exp_avg_sq": torch.rand(parameter.shape, generator=generator) * 1e-6,
    }
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
torch.save({
    "step": 1000, "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(),
    "scheduler_state_dict": scheduler.state_dict(), "loss": 3.5,
}, folder / "script.pt")
named = dict(model.named_parameters())
def write(writer):
    writer.bytes("config.json", model.config.to_json_string().encode())
    writer.tensors("model.safetensors", {n: p.detach() for n, p in named.items()}, {"format": "pt"})
    moments = {f"{k}/{n}": v for n, p in named.items() for k, v in optimizer.state[p].items()}
    writer.tensors("optimizer.safetensors", moments)
    writer.tensors("rng.safetensors", {"cpu": torch.get_rng_state()})
    writer.json("trainer_state.json", {"counters": {}, "config": {}, "mixture": {}, "identity": {}})
write_folder(folder / "step", write, 1000, {"tokens": 1})
print(sum(p.numel() for p in named.values()), max(p.nbytes for p in named.values()))
"""


def size(path: Path) -> int:
    """Return the bytes of a file, or of the files of a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir())


def convert(source: Path, target: Path, original: Path, *options: str) -> dict[str, Any]:
    """Convert in a process of its own; return what it took, and how many tensors are the original's to the last bit."""
    from ekiden.checkpoint.convert import compare, open_tree

    began = time.perf_counter()
    command = [sys.executable, "-c", CONVERT, str(source), str(target), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr)
    equal = compare(open_tree(original), open_tree(target))
    return {
        "from": source.name,
        "to": target.name + " ".join(("", *options)),
        "bytes_from": size(source),
        "bytes_to": size(target),
        "ratio": size(target) / size(source),
        "seconds": seconds,
        "peak_bytes": int(done.stdout.splitlines()[-1]),
        "tensors_equal": equal,
    }


def measure(preset: str, vocabulary: int, folder: Path, readable: bool) -> dict[str, Any]:
    """Return the figures of one model."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = subprocess.run(
        [sys.executable, "-c", MAKE, preset, str(vocabulary), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    parameters, largest = map(int, made.stdout.split())
    script, step = folder / "script.pt", folder / "step"
    plan = [
        (script, folder / "script.json", script),
        (folder / "script.json", folder / "script-again.pt", script),
        (step, folder / "step.json", step),
        (folder / "step.json", folder / "step-again", step),
        (step, folder / "step.pt", step),
        (folder / "step.pt", folder / "step-once-more", step),
    ]
    rows = []
    for source, target, original in plan:
        rows.append(convert(source, target, original))
        print_row(rows[-1])
    if readable:
        rows.append(convert(script, folder / "numbers.json", script, "--readable"))
        print_row(rows[-1])
    shutil.rmtree(folder)
    limit = 2 * largest + LIMIT_EXTRA_BYTES
    bound = all(row["peak_bytes"] <= limit for row in rows)
    ratio = max(row["ratio"] for row in rows if row["from"] == "script.pt" and row["to"].endswith("json"))
    return {
        "preset": preset,
        "parameters": parameters,
        "largest_tensor_bytes": largest,
        "peak_limit_bytes": limit,
        "rows": rows,
        "peaks_below_limit": bound,
        "ratio_below_limit": ratio <= LIMIT_RATIO,
    }


def print_row(row: dict[str, Any]) -> None:
    """Print one conversion."""
    print(
        f"{row['from']:>14} -> {row['to']:<24} {row['bytes_to'] / 1e6:9.1f} MB {row['ratio']:6.3f}x {row['seconds']:7.1f} s"
        f"  peak {row['peak_bytes'] / 1e6:7.1f} MB  {row['tensors_equal']} tensors equal",
        flush=True,
    )


def main() -> None:
    """Measure each model; print a table and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="a folder to work in; it is removed after")
    parser.add_argument(
        "--models", nargs="+", default=["gpt2-10m:16000", "gemma3-270m:262144"], help="PRESET:PIECES"
    )
    parser.add_argument(
        "--readable", default="gpt2-10m", help="the preset also written as lists of numbers; none: no"
    )
    arguments = parser.parse_args()
    results = []
    for model in arguments.models:
        preset, _, pieces = model.partition(":")
        print(f"{preset}, {pieces} pieces", flush=True)
        results.append(measure(preset, int(pieces), arguments.folder / preset, preset == arguments.readable))
    print(json.dumps({"benchmark": "convert", "models": results}))


if __name__ == "__main__":
    main()
