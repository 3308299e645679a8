"""What a recipe learns from a token: small models on real text, bits per byte of every language against tokens.

    python benchmarks/learning.py --corpus CORPUS --folder OUT --quick

Trains both families with Ekiden's own `train` for a fixed number of tokens, for every recipe, seed and learning rate
asked for, and compares them. A finished run is kept in `OUT/runs/` under its recipe, rate, seed and tokens; the same
command again does only what is missing, and goes on with what was interrupted. `--report` trains nothing. As many runs
go on at a time as there are cores, each on one thread, so that the figures are the same on any number of cores.

`tokens_ratio` is the share of the plan recipe's tokens with which another recipe ends where the plan's ends (macro
bits per byte), from runs of several lengths, each with its own schedule; between two lengths it is interpolated in
the logarithm of the tokens; where the shortest of them ends lower already, its own share. `konkani_change_percent`
compares Ekiden's mixture and tokenizer (by n^0.3) with a proportional mixture and a tokenizer by n^0.5, all else
equal. `largest` are the largest values inside a model at its end (fp16 ends
at 65,504) and the steps that were skipped. Curves go to `OUT/learning.png`. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    # 3.1M parameters with 4,096 pieces.
    "gemma3": {
        "preset": "gemma3-tiny",
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 48,
        "intermediate_size": 512,
        "sliding_window": 128,
    },
    # 3.5M.
    "gpt2": {
        "preset": "gpt2-10m",
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 32,
        "intermediate_size": 768,
    },
}
"""Models of the comparison."""

COMMON: dict[str, Any] = {
    "max_length": 256,
    "batch_size": 4,
    "temperature": 0.5,
    "small_language_share": 0.0,
}
"""Settings of every recipe that does not change them: one mixture for all that compares how they learn."""

RECIPES: dict[str, dict[str, Any]] = {
    "plan": {
        "optimizer": "adamw",
        "schedule": "cosine",
        "initialization": "huggingface",
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "min_learning_rate_ratio": 0.1,
        "warmup_steps": 100,
    },
    # nanoGPT's settings for small models (config/train_shakespeare_char.py), its rate too; GPT-2's initialisation in
    # transformers is nanoGPT's. Not here: its dropout of 0.2, its 64 samples a step.
    "nanogpt": {
        "optimizer": "adamw",
        "schedule": "cosine",
        "initialization": "huggingface",
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "min_learning_rate_ratio": 0.1,
        "warmup_steps": 100,
    },
    # nanochat's Muon, rates, momenta and schedule (karpathy/nanochat at 92d63d4: gpt.py, optim.py, base_train.py), on
    # Ekiden's models: not its architecture, nor its untied embedding, whose rate of 0.3 a tied one cannot take; this has
    # its output's, 0.008. Its running mean of the rows' lengths is `muon_even`'s of one step. Not here: momentum falling to
    # 0.9 while the rate falls, cautious weight decay (its rule gives next to none at this length), 40 steps of warm-up.
    "nanochat": {
        "weight_decay": 0.0,
        "muon_momentum": 0.97,
        "muon_first_momentum": 0.85,
        "muon_momentum_steps": 400,
        "muon_first_beta1": 0.8,
        "beta1": 0.8,
        "beta2": 0.96,
        "adam_epsilon": 1e-10,
        "initialization": "scaled",
        # 0.008 * sqrt(768 / width) where ours is rate * sqrt(256 / width).
        "learning_rate": 0.008 * math.sqrt(3),
        "decay_ratio": 0.65,
        "min_learning_rate_ratio": 0.05,
        "max_grad_norm": 0.0,
    },
    # What Ekiden does where nothing is set, with the plan's mixture; and by parts.
    "default": {},
    "adamw-scaled": {"optimizer": "adamw", "initialization": "scaled"},
    "muon-huggingface": {"initialization": "huggingface"},
    # The same on other mixtures: as the languages are, and Ekiden's own.
    "proportional": {"temperature": 1.0},
    "mixed": {"temperature": 1.0, "small_language_share": 0.15},
}
"""What each recipe sets."""

BASELINE = "plan"
WHOLE = 307_200
"""Tokens of the plan recipe's runs."""
RATES = {
    ("gemma3", "plan"): 0.016,
    ("gpt2", "plan"): 0.003,
    ("gemma3", "nanogpt"): 0.001,
    ("gpt2", "nanogpt"): 0.001,
    ("gemma3", "adamw-scaled"): 0.016,
    ("gpt2", "adamw-scaled"): 0.003,
}
"""Learning rate of AdamW where the recipe has one of its own: the best of those tried (docs/recipe.md)."""
MATRIX_RATE = 0.02
LENGTHS = {"plan": (1.0,), "proportional": (0.6,), "mixed": (0.6,), "default": (0.3, 0.2, 0.15)}
"""Lengths of the runs that are done where none is given, as shares of the plan recipe's tokens."""
TOKENIZERS = {"mixed": 0.3}
"""n^this of the languages' bytes makes the recipe's tokenizer: `ekiden tokenizer train`'s own for Ekiden's mixture."""
TOKENIZER = 0.5
"""The others'."""


@dataclass(frozen=True)
class Run:
    """One training run: what tells it from the others."""

    family: str
    recipe: str
    rate: float
    seed: int
    tokens: int
    more: tuple[tuple[str, str], ...] = ()
    tokenizer: float = TOKENIZER

    @property
    def name(self) -> str:
        """Folder of the run."""
        more = "".join(f"-{key}={value}" for key, value in self.more)
        return f"{self.family}-{self.recipe}-lr{self.rate:g}-seed{self.seed}-{self.tokens}{self.of_tokenizer}{more}"

    @property
    def of_tokenizer(self) -> str:
        """The tokenizer, where it is not the recipe's own."""
        own = TOKENIZERS.get(self.recipe, TOKENIZER)
        return "" if self.tokenizer == own else f"-n^{self.tokenizer:g}"

    @property
    def label(self) -> str:
        """Its recipe with all that was changed."""
        return self.recipe + self.of_tokenizer + "".join(f" {key}={value}" for key, value in self.more)


def shards_of(folder: Path, temperature: float) -> Path:
    """Return where the token shards under a tokenizer by n^temperature are."""
    return folder / f"shards-n^{temperature:g}"


def prepare(corpus: str, folder: Path, vocab_size: int, temperature: float) -> None:
    """Make token shards of the corpus under a tokenizer of its own, once."""
    from ekiden.tokenizer.train import train_tokenizer
    from ekiden.tokens.build import preprocess

    tokenizer = folder / f"tokenizer-n^{temperature:g}.model"
    if not tokenizer.exists():
        train_tokenizer(
            [corpus], str(tokenizer), vocab_size=vocab_size, model_type="bpe", temperature=temperature
        )
    preprocess([corpus], str(tokenizer), str(shards_of(folder, temperature)), test_split=0.01)


def train_one(run: Run, folder: Path, threads: int, evaluations: int) -> dict[str, Any]:
    """Train `run` unless it is done; return its curve: tokens and bits per byte of every evaluation."""
    place = folder / "runs" / run.name
    finished = place.with_name(run.name + ".json")
    if finished.exists():
        return json.loads(finished.read_text())
    import torch
    from low_precision import largest_value

    from ekiden.config import build_config
    from ekiden.training.history import read_history
    from ekiden.training.loop import train

    torch.set_num_interop_threads(1)
    settings = {**SHAPES[run.family], **COMMON, **RECIPES[run.recipe], **dict(run.more)}
    config = build_config(settings.pop("preset"), **settings)
    steps = run.tokens // (config.batch_size * config.gradient_accumulation_steps * config.max_length)
    every = max(1, steps // evaluations)
    run_settings = {
        "dataset_path": str(shards_of(folder, run.tokenizer)),
        "output_dir": str(place),
        "max_steps": steps,
        (
            "matrix_learning_rate" if settings.get("optimizer", "muon") == "muon" else "learning_rate"
        ): run.rate,
        "seed": run.seed,
        "num_threads": threads,
        "eval_steps": every,
        "eval_tokens": 8192,
        "save_steps": 2 * every,
        "max_checkpoints": 2,
        "sample_tokens": 1,
        "report": False,
    }
    place.mkdir(parents=True, exist_ok=True)
    with (
        (place / "log.txt").open("a") as log,
        contextlib.redirect_stderr(log),
        contextlib.redirect_stdout(log),
    ):
        ended = train(build_config(SHAPES[run.family]["preset"], **{**settings, **run_settings}))
        if ended.status != "completed":
            raise SystemExit(f"{run.name} was stopped ({ended.reason}); the same command goes on with it")
        largest = largest_value(place / "final_model", shards_of(folder, run.tokenizer))
    per_step = steps and run.tokens // steps
    records = list(read_history(place / "history.jsonl"))
    evaluated = [record for record in records if record["kind"] == "eval"]
    result = {
        "run": asdict(run),
        "tokens": [record["step"] * per_step for record in evaluated],
        "bits_per_byte": [bits_of(record) for record in evaluated],
        "seconds": max(record["seconds"] for record in records if record["kind"] == "train"),
        "losses": [(r["step"], r["loss"], r["grad_norm"]) for r in records if r["kind"] == "train"],
        "skipped": sum(r.get("event") == "skip" for r in records),
        "largest_value": round(largest, 1),
    }
    finished.write_text(json.dumps(result))
    for name in ("checkpoints", "best", "final_model"):
        shutil.rmtree(place / name, ignore_errors=True)
    return result


def bits_of(record: dict[str, Any]) -> dict[str, float]:
    """Return bits per byte of every language and their mean, from an evaluation's record."""
    bits = {name: figures["bits_per_byte"] for name, figures in record["languages"].items()}
    return {**bits, "macro": record["macro"]["bits_per_byte"]}


def finished_runs(folder: Path) -> list[tuple[Run, dict[str, Any]]]:
    """Return every finished run and its result."""
    results = []
    for path in sorted((folder / "runs").glob("*.json")):
        result = json.loads(path.read_text())
        fields = result["run"]
        fields["more"] = tuple((key, value) for key, value in fields["more"])
        results.append((Run(**fields), result))
    return results


def final(result: dict[str, Any]) -> dict[str, float]:
    """Return the bits per byte at the end of a run."""
    return result["bits_per_byte"][-1]


def groups(results: list[tuple[Run, dict[str, Any]]]) -> dict[tuple[str, ...], list[dict[str, float]]]:
    """Return the final figures of all seeds, by (family, recipe with its changes, rate, tokens)."""
    grouped: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    for run, result in results:
        grouped.setdefault((run.family, run.label, run.rate, run.tokens), []).append(final(result))
    return grouped


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over seeds."""
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def best_rates(
    grouped: dict[Any, list[dict[str, float]]],
) -> dict[tuple[str, str, int], list[dict[str, float]]]:
    """Return by (family, recipe, tokens) the seeds' figures at the rate that did best among those with most seeds."""
    best: dict[tuple[str, str, int], tuple[Any, list[dict[str, float]]]] = {}
    for (family, recipe, _rate, tokens), rows in grouped.items():
        rank = (-len(rows), mean(rows)["macro"])
        key = (family, recipe, tokens)
        if key not in best or rank < best[key][0]:
            best[key] = (rank, rows)
    return {key: rows for key, (_rank, rows) in best.items()}


def tokens_ratio(
    best: dict[tuple[str, str, int], list[dict[str, float]]], family: str, recipe: str
) -> float | None:
    """Return the share of the plan recipe's tokens with which `recipe` ends as low, or None where none of its runs does."""
    lengths = [tokens for f, r, tokens in best if (f, r) == (family, BASELINE)]
    if not lengths:
        return None
    whole = max(lengths)
    goal = mean(best[family, BASELINE, whole])["macro"]
    curve = sorted((t, mean(rows)["macro"]) for (f, r, t), rows in best.items() if (f, r) == (family, recipe))
    before: tuple[int, float] | None = None
    for tokens, bits in curve:
        if bits <= goal:
            if before is None:
                return tokens / whole
            part = (before[1] - goal) / (before[1] - bits)
            return math.exp(math.log(before[0]) + part * math.log(tokens / before[0])) / whole
        before = (tokens, bits)
    return None


def print_table(grouped: dict[tuple[str, ...], list[dict[str, float]]]) -> None:
    """Print a line for every recipe, rate and length."""
    for (family, recipe, rate, tokens), rows in sorted(grouped.items()):
        averages = mean(rows)
        spread = max(row["macro"] for row in rows) - min(row["macro"] for row in rows)
        languages = "  ".join(f"{name} {bits:.4f}" for name, bits in averages.items() if name != "macro")
        print(
            f"{family:<7} {recipe:<40} lr {rate:<7g} {tokens:>9,} tokens  {len(rows)} seeds  "
            f"macro {averages['macro']:.4f} (spread {spread:.4f})  {languages}"
        )


def largest_values(results: list[tuple[Run, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the largest values in the models of each recipe's longest runs, and the steps that were skipped there."""
    longest: dict[str, tuple[int, dict[str, Any]]] = {}
    for run, result in results:
        key = f"{run.family} {run.label}"
        before, figures = longest.get(key, (0, {}))
        if "largest_value" not in result or run.tokens < before:
            continue
        if run.tokens > before:
            figures = {"tokens": run.tokens, "value": 0.0, "skipped": 0}
        figures["value"] = max(figures["value"], result["largest_value"])
        figures["skipped"] += result["skipped"]
        longest[key] = run.tokens, figures
    return {key: figures for key, (_tokens, figures) in longest.items()}


def report(folder: Path) -> dict[str, Any]:
    """Print a table of every finished run, and return the figures of the last line."""
    results = finished_runs(folder)
    grouped = groups(results)
    print_table(grouped)
    best = best_rates(grouped)
    ratios: dict[str, dict[str, float | None]] = {}
    bits: dict[str, dict[str, dict[str, float]]] = {}
    changes: dict[str, dict[str, float]] = {}
    for family in sorted({key[0] for key in best}):
        recipes = sorted({key[1] for key in best if key[0] == family})
        ratios[family] = {
            recipe: tokens_ratio(best, family, recipe)
            for recipe in recipes
            if recipe not in (BASELINE, "mixed", "proportional")
        }
        bits[family] = {
            f"{recipe} {tokens}": {k: round(v, 4) for k, v in mean(rows).items()}
            for (f, recipe, tokens), rows in sorted(best.items())
            if f == family
        }
        change = mixture_change(best, family)
        if change:
            changes[family] = change
            print(f"{family}: Ekiden's mixture and tokenizer against proportional, percent: {change}")
    draw(results, folder / "learning.png")
    return {
        "tokens_ratio": ratios,
        "konkani_change_percent": {family: change.get("konkani") for family, change in changes.items()},
        "change_percent": changes,
        "bits_per_byte": bits,
        "largest": largest_values(results),
    }


def draw(results: list[tuple[Run, dict[str, Any]]], path: Path) -> None:
    """Draw bits per byte of every language against tokens, a line for each run, a colour for each recipe."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves: matplotlib is missing (pip install 'ekiden[report]')")
        return
    families = sorted({run.family for run, _ in results})
    languages = sorted({name for _, result in results for name in final(result)})
    recipes = sorted({run.label for run, _ in results})
    if not results:
        return
    figure = Figure(figsize=(4 * len(languages), 3.5 * len(families)), layout="constrained")
    axes = figure.subplots(len(families), len(languages), squeeze=False)
    for run, result in results:
        for column, language in enumerate(languages):
            place = axes[families.index(run.family)][column]
            bits = [point.get(language, math.nan) for point in result["bits_per_byte"]]
            place.plot(
                result["tokens"], bits, color=f"C{recipes.index(run.label) % 10}", label=run.label, lw=1
            )
            place.set(
                title=f"{run.family}, {language}", xscale="log", xlabel="tokens", ylabel="bits per byte"
            )
    named = {line.get_label(): line for place in axes.flat for line in place.get_lines()}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)


def mixture_change(best: dict[tuple[str, str, int], list[dict[str, float]]], family: str) -> dict[str, float]:
    """Return how much the default mixture changes each language against a proportional one, in percent."""
    lengths = {t for f, r, t in best if (f, r) == (family, "mixed")}
    lengths &= {t for f, r, t in best if (f, r) == (family, "proportional")}
    if not lengths:
        return {}
    tokens = max(lengths)
    ours, theirs = mean(best[family, "mixed", tokens]), mean(best[family, "proportional", tokens])
    return {name: round(100 * (ours[name] / theirs[name] - 1), 2) for name in ours}


def numbers(text: str) -> list[float]:
    """Return the numbers of a comma-separated list."""
    return [float(item) for item in text.split(",")]


def chosen_runs(options: argparse.Namespace, more: tuple[tuple[str, str], ...]) -> list[Run]:
    """Return the runs that the options ask for, the plan's first: everything else is compared with them."""
    runs = []
    for seed in [1.0] if options.quick else options.seeds:
        for recipe in options.recipe or LENGTHS:
            lengths = options.tokens or [share * WHOLE for share in LENGTHS.get(recipe, (0.3,))]
            tokenizer = options.tokenizer_temperature or TOKENIZERS.get(recipe, TOKENIZER)
            for family in options.family or SHAPES:
                rates = options.rates or [RATES.get((family, recipe), MATRIX_RATE)]
                runs += [
                    Run(family, recipe, rate, int(seed), round(tokens), more, tokenizer)
                    for tokens in lengths
                    for rate in rates
                ]
    return runs


def cores() -> int:
    """Return how many runs to do at a time: one a core that this process may use; one where there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Train what is asked for and missing, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, help="folder with a sub-folder a language")
    parser.add_argument("--folder", type=Path, required=True, help="shards, runs and results")
    parser.add_argument(
        "--quick", action="store_true", help="seed 1 alone: for 2 cores and a quarter of an hour"
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--family", choices=list(SHAPES), action="append")
    parser.add_argument("--recipe", choices=list(RECIPES), action="append")
    parser.add_argument("--rates", type=numbers, help="learning rates, comma-separated")
    parser.add_argument("--seeds", type=numbers, default=[1.0, 2.0, 3.0], help="comma-separated")
    parser.add_argument("--tokens", type=numbers, help="lengths of runs, comma-separated")
    parser.add_argument("--set", nargs="*", default=[], help="field=value of TrainConfig, for every run")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument(
        "--tokenizer-temperature",
        type=float,
        help="balance of the tokenizer of every recipe (default: 0.3 for `mixed`, 0.5 for the others)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of one run; another number gives other roundings"
    )
    parser.add_argument("--jobs", type=int, help="runs at a time (default: the cores there are; 1 on a GPU)")
    parser.add_argument("--evaluations", type=int, default=3, help="evaluations a run")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not options.report:
        more = tuple(sorted(tuple(pair.split("=", 1)) for pair in options.set))
        runs = chosen_runs(options, more)
        for temperature in sorted({run.tokenizer for run in runs}):
            prepare(options.corpus, options.folder, options.vocab_size, temperature)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs or cores(), mp_context=spawn, max_tasks_per_child=1) as pool:
            waiting = {
                pool.submit(train_one, run, options.folder, options.threads, options.evaluations): run
                for run in runs
            }
            for done in as_completed(waiting):
                result = done.result()
                print(
                    f"{waiting[done].name}: macro {final(result)['macro']:.4f} in {result['seconds']:.0f} s",
                    flush=True,
                )
    print(json.dumps(report(options.folder)))


if __name__ == "__main__":
    main()
