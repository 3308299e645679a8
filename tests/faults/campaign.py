"""The kill campaign: runs ended by SIGKILL at random moments and resumed until done, against an uninterrupted one.

    python tests/faults/campaign.py --kills 100 --preset gemma3-tiny

Every trial is a fresh process running `ekiden.train`, forked from one that has imported everything (an import of
torch costs more than a trial). What a trial must leave, and the expected result, are kept outside the run directory.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekiden.checkpoint.manifest import read_manifest
from ekiden.config import TrainConfig, build_config
from ekiden.quickstart import standard_library_prose
from ekiden.tokenizer.train import train_tokenizer
from ekiden.tokens.build import preprocess
from ekiden.training.history import read_history
from ekiden.training.loop import train

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "sliding_window": 16,
    "max_length": 32,
    "batch_size": 4,
}


@dataclass
class Outcome:
    """What a run left: losses by step as they stand in the history (every step once), hashes of the final files."""

    losses: dict[int, float]
    steps_twice: int
    weights: dict[str, str]


def make_shards(folder: Path) -> Path:
    """Write a corpus of the standard library's prose as token shards of 500 pieces."""
    for language, part in (("english", 0), ("other", 1)):
        path = folder / "corpus" / language / "text.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [text for number, text in enumerate(standard_library_prose()) if number % 2 == part][:150]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = [str(folder / "corpus")]
    train_tokenizer(corpus, str(folder / "tokenizer.model"), vocab_size=500, model_type="bpe")
    preprocess(corpus, str(folder / "tokenizer.model"), str(folder / "shards"), test_split=0.05, num_proc=1)
    return folder / "shards"


def settings(preset: str, shards: Path, run: Path, steps: int, **more: Any) -> TrainConfig:
    """Return the settings of a run that takes seconds and saves all the time."""
    small = dict(SMALL)
    if preset.startswith("gpt2"):
        small["num_key_value_heads"] = 2
    options = {
        "dataset_path": str(shards),
        "output_dir": str(run),
        "max_steps": steps,
        "log_steps": 1,
        "eval_steps": 10,
        "eval_tokens": 200,
        "save_steps": 3,
        "sample_tokens": 4,
        "num_threads": 1,
        "warmup_steps": 2,
    }
    return build_config(preset, **{**small, **options, **more})


def trial(config: TrainConfig, log: Path, kill_after: float | None) -> int | None:
    """Run `config` in a forked process; SIGKILL it after so many seconds; return its status, None where killed."""
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = 1
        try:
            train(config)
            status = 0
        except BaseException as error:
            os.write(2, f"\n{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    deadline = time.monotonic() + kill_after if kill_after is not None else None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def outcome(run: Path) -> Outcome:
    """Read what a finished run left."""
    losses: dict[int, float] = {}
    twice = 0
    for record in read_history(run / "history.jsonl"):
        if record["kind"] == "train":
            twice += record["step"] in losses
            losses[record["step"]] = record["loss"]
    newest = max((run / "checkpoints").glob("step-*"))
    manifest = read_manifest(newest)
    files = {name: manifest.files[name].sha256 for name in ("model.safetensors", "optimizer.safetensors")}
    return Outcome(losses, twice, files)


def acknowledged(run: Path) -> int:
    """Return the newest step whose checkpoint stands under its final name."""
    steps = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    return max(steps, default=0)


def campaign(
    preset: str, kills: int, shards: Path, folder: Path, steps: int = 30, seed: int = 0
) -> dict[str, Any]:
    """Kill runs at random moments until there were `kills`; resume each to its end; compare with the reference.

    Returns:
        The counts of what was tried, resumed without help, bit-identical, and lost.
    """
    generator = random.Random(seed)
    log = folder / "log"
    began = time.monotonic()
    assert trial(settings(preset, shards, folder / "reference", steps), log, None) == 0, log.read_text()
    duration = time.monotonic() - began
    expected = outcome(folder / "reference")
    result = {
        "preset": preset,
        "kills": 0,
        "runs": 0,
        "failed_resumes": 0,
        "runs_bit_identical": 0,
        "checkpoints_lost": 0,
    }
    while result["kills"] < kills:
        run = folder / f"run-{result['runs']}"
        result["runs"] += 1
        finished = False
        while not finished:
            before = acknowledged(run)
            delay = generator.uniform(0, duration) if result["kills"] < kills else None
            status = trial(settings(preset, shards, run, steps), log, delay)
            finished = status is not None
            result["kills"] += status is None
            result["failed_resumes"] += status not in (None, 0)
            result["checkpoints_lost"] += acknowledged(run) < before
        found = outcome(run)
        same = (
            found == expected and found.steps_twice == 0 and sorted(found.losses) == list(range(1, steps + 1))
        )
        result["runs_bit_identical"] += same
        if same:
            shutil.rmtree(run)
    return result


def main() -> None:
    """Run the campaign for one or both families."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--preset", action="append")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shards = make_shards(Path(name))
        results = []
        for preset in options.preset or ["gpt2-10m", "gemma3-tiny"]:
            folder = Path(name) / preset
            folder.mkdir()
            results.append(campaign(preset, options.kills, shards, folder, seed=options.seed))
            print(json.dumps(results[-1]), flush=True)
    good = all(
        r["failed_resumes"] == r["checkpoints_lost"] == 0 and r["runs"] == r["runs_bit_identical"]
        for r in results
    )
    print(json.dumps({"campaign": "sigkill", "seed": options.seed, "passed": good, "results": results}))
    sys.exit(not good)


if __name__ == "__main__":
    main()
