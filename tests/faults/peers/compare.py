"""The same kills, full disks, flipped bits and power cuts on Ekiden and on the trainers that people use today.

    python3 -m venv /tmp/venv-peers
    /tmp/venv-peers/bin/pip install -r tests/faults/peers/requirements.txt
    /tmp/venv-peers/bin/pip install --editable .
    /tmp/venv-peers/bin/python tests/faults/peers/compare.py --kills 40

Every system trains the same small GPT-2 on one thread and saves after every step, which is the worst window there is;
after each fault the same command is given again. A full disk and a power cut need root (a mounted file system); a
Lightning column needs a second file system (`--other-tmp`). Seeds are fixed, but when a kill falls depends on the
machine. Tables come first; the last line printed is one JSON object.
"""

# ruff: noqa: E402 - threads and the path of the package are set before anything else is imported
from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch: a process with threads cannot be forked
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import small_shards
from power_cut import MOUNTS

from peers.ekiden_trainer import Ekiden
from peers.faults import Driver, Row, bit_flip, full_disk, kill, kill_in_write
from peers.huggingface import HuggingFace
from peers.lightning_trainer import Lightning, LightningOtherTmpdir
from peers.power_cut_rows import power_cut, write_until_killed
from peers.systems import System
from peers.torch_scripts import Dcp, TorchRename, TorchSave

FAULTS = ("kill", "kill-in-write", "full-disk", "bit-flip", "power-cut")


def all_systems(other_tmp: str) -> dict[str, System]:
    """Return every system by name."""
    systems: list[System] = [
        HuggingFace(),
        Lightning(),
        LightningOtherTmpdir(other_tmp),
        TorchSave(),
        TorchRename(),
        Dcp(),
        Ekiden(),
    ]
    return {system.name: system for system in systems}


def run_faults(system: System, options: argparse.Namespace, work: Path, shards: Path) -> dict[str, list[Row]]:
    """Run the chosen faults on one system; return rows by fault."""
    driver = Driver(system, work, shards)
    runs: dict[str, Callable[[], list[Row]]] = {
        "kill": lambda: [kill(driver, options.kills, options.seed, every) for every in options.save_every],
        "kill-in-write": lambda: [kill_in_write(driver, options.tenths)],
        "full-disk": lambda: [
            full_disk(driver, options.full_disks, options.seed, kind, greedy)
            for kind, greedy in (("tmpfs", False), ("ext4", False), ("tmpfs", True))
        ],
        "bit-flip": lambda: bit_flip(driver, options.flips, options.seed),
        "power-cut": lambda: [power_cut(driver, options.power_cuts, options.seed, mount) for mount in MOUNTS],
    }
    rows: dict[str, list[Row]] = {}
    for fault, run in runs.items():
        if fault in options.faults and applies(system, fault):
            began = time.monotonic()
            rows[fault] = [{"system": system.name} | row for row in run()]
            print(f"{system.name}: {fault} in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return rows


def applies(system: System, fault: str) -> bool:
    """Where temporary files lie makes no difference to a bit that flips later."""
    return not (fault == "bit-flip" and system.name == "lightning-other-tmp")


def print_table(fault: str, rows: list[Row], titles: dict[str, str]) -> None:
    """Print the rows of a fault as a Markdown table."""
    columns = [name for name in rows[0] if name not in ("problems", "system")]
    print(f"\n{fault}\n")
    print("| system | " + " | ".join(name.replace("_", " ") for name in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for row in rows:
        print(f"| {titles[row['system']]} | " + " | ".join(str(row[name]) for name in columns) + " |")
    for row in rows:
        for problem in row.get("problems", []):
            print(f"{row['system']}: {problem}")


def facts(systems: list[System], options: argparse.Namespace) -> dict[str, Any]:
    """Return versions, machine and options."""
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    for system in systems:
        versions |= system.versions()
    return {
        "versions": versions,
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "seed": options.seed,
        "settings": {system.name: system.settings for system in systems},
    }


def names(text: str) -> list[str]:
    """Return the parts of a list with commas."""
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[int]:
    """Return the numbers of a list with commas."""
    return [int(part) for part in names(text)]


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40, help="for each system")
    parser.add_argument(
        "--save-every", type=numbers, default=[1, 10], help="steps, with commas: a kill table for each"
    )
    parser.add_argument(
        "--tenths", type=numbers, default=[1, 3, 5, 7, 9], help="where in a file kill-in-write falls"
    )
    parser.add_argument("--full-disks", type=int, default=12, help="for each system and kind of disk")
    parser.add_argument(
        "--flips", type=int, default=100, help="for each of a system's two files; 200 in a single one"
    )
    parser.add_argument("--power-cuts", type=int, default=12, help="for each system and way of mounting")
    parser.add_argument("--writer", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--only", type=names, default=[], help="systems, with commas")
    parser.add_argument("--faults", type=names, default=list(FAULTS), help="with commas: " + ",".join(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", help="folder for the runs; default: a temporary one")
    parser.add_argument(
        "--other-tmp", default="/dev/shm", help="folder on another file system than the runs'"
    )
    options = parser.parse_args()
    unknown = set(options.faults) - set(FAULTS) | set(options.only) - set(all_systems(options.other_tmp))
    if unknown:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; systems: {', '.join(all_systems(options.other_tmp))}"
        )
    return options


def main() -> None:
    """Run what was asked for, print tables and one JSON object."""
    options = parse()
    torch.set_num_threads(1)
    if options.writer:
        name, *paths = options.writer
        write_until_killed(all_systems(options.other_tmp)[name].train, *map(Path, paths))
        return
    systems = [
        system
        for name, system in all_systems(options.other_tmp).items()
        if not options.only or name in options.only
    ]
    tables: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        (Path(name) / "data").mkdir()
        shards = small_shards(Path(name) / "data")
        for system in systems:
            system.load_libraries()
            work = Path(name) / system.name
            work.mkdir()
            for fault, rows in run_faults(system, options, work, shards).items():
                tables.setdefault(fault, []).extend(rows)
    for fault, rows in tables.items():
        print_table(fault, rows, {system.name: system.title for system in systems})
    print(json.dumps({"comparison": tables} | facts(systems, options)))


if __name__ == "__main__":
    main()
