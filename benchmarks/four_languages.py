"""The whole path on a real corpus: tokenizer, shards, training, and what each language learned.

    python benchmarks/four_languages.py --corpus CORPUS --folder OUT

For each preset: validation loss of every language beside the cross-entropy of a unigram model of its training tokens
(what a model reaches that only knows which tokens are frequent). Run again, it goes on where it was. The last line
printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PRESETS = {
    "gpt2-10m": ["--batch-size", "4", "--max-length", "256"],
    "gemma3-tiny": [],
}


def ekiden(*arguments: object) -> str:
    """Run one verb and return what it printed."""
    command = [sys.executable, "-m", "ekiden", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Run every stage and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--preset", choices=list(PRESETS), action="append")
    parser.add_argument("--model-type", default="unigram")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    tokenizer, shards = options.folder / "tokenizer.model", options.folder / "shards"
    if not tokenizer.exists():
        print(
            ekiden(
                "tokenizer",
                "train",
                options.corpus,
                "--output",
                tokenizer,
                "--model-type",
                options.model_type,
            )
        )
    print(ekiden("preprocess", options.corpus, "--tokenizer", tokenizer, "--output-dir", shards))
    results: dict[str, Any] = {}
    for preset in options.preset or list(PRESETS):
        run = options.folder / preset
        train = ["train", preset, "--dataset-path", shards, "--output-dir", run, "--max-steps", options.steps]
        train += ["--num-threads", options.threads, "--temperature", options.temperature]
        train += ["--small-language-share", 0]
        ekiden(*train, "--eval-tokens", 4000, "--eval-steps", 0, *PRESETS[preset])
        result = json.loads(
            ekiden("evaluate", run, "--dataset-path", shards, "--max-tokens", 20000, "--json")
        )
        results[preset] = {
            language: {name: round(values[name], 4) for name in ("loss", "unigram_loss", "bits_per_byte")}
            for language, values in result["languages"].items()
        }
        for language, values in results[preset].items():
            print(f"{preset:<12} {language:<10} {values}", flush=True)
    lower = {
        preset: min(v["unigram_loss"] - v["loss"] for v in table.values())
        for preset, table in results.items()
    }
    print(json.dumps({"steps": options.steps, "nats_below_unigram_at_least": lower, "results": results}))


if __name__ == "__main__":
    main()
