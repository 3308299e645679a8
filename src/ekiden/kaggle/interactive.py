"""What the cells of a Kaggle notebook call: the corpus and an earlier run found among the inputs, training with a plot.

The steps are those of a leg (`leg`); a person looks on, so that what goes wrong is a sentence instead of a verdict.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ekiden.errors import UserError
from ekiden.kaggle import inputs, leg, session
from ekiden.progress import human_count, human_duration
from ekiden.training.history import read_history

MAX_POINTS = 2000
"""Of a curve: more is not seen, and costs seconds a drawing."""


def find_dataset(corpus: Iterable[str] = (), vocab_size: int = 16_000) -> Path:
    """Return token shards made of what lies among the inputs.

    A packed corpus (`ekiden kaggle corpus upload`) is unpacked; if it is text, a tokenizer is trained and the text is
    preprocessed here. Without one, an input folder that holds `dataset.json` is taken.

    Args:
        corpus: datasets (owner/slug); none: the first corpus that is found.

    Raises:
        UserError: there is none.
    """
    scratch = session.scratch_folder(session.ROOT)
    for folder in inputs.folders_holding(session.ROOT, "dataset.json"):
        return folder
    try:
        manifest, chunks = inputs.find_pack(session.ROOT, [ref for ref in corpus if ref], "")
        dataset = inputs.unpack(manifest, chunks, scratch / "corpus")
    except session.Ended as end:
        raise UserError(
            f"{end.args[1]}; add the datasets that `ekiden kaggle corpus upload` printed as inputs"
        ) from None
    if not (dataset / "dataset.json").is_file():
        text, dataset, tokenizer = dataset, scratch / "shards", scratch / "tokenizer.model"
        run_verb("tokenizer", "train", text, "--output", tokenizer, "--vocab-size", vocab_size)
        run_verb("preprocess", text, "--tokenizer", tokenizer, "--output-dir", dataset)
    print(f"corpus {manifest['name']}: {dataset}")
    return dataset


def take_up() -> Path:
    """Carry the furthest run among the inputs (an earlier version's output) forward; return the run directory."""
    run = session.ROOT / "working" / "run"
    earlier = [folder / "run" for folder in inputs.folders_holding(session.ROOT, "run")]
    earlier = [path for path in earlier if inputs.checkpoints_of(path)]
    if inputs.checkpoints_of(run):
        print(f"going on in {run}")
    elif not earlier:
        print("no earlier run among the inputs: this is the beginning")
    else:
        source = max(earlier, key=lambda path: inputs.identity(inputs.checkpoints_of(path)[0])["step"])
        if not inputs.carry_forward(source, run):
            raise UserError(
                f"no checkpoint in {source} is what was saved; add another version's output as input"
            )
        print(f"going on from {source} at step {inputs.identity(inputs.checkpoints_of(run)[0])['step']}")
    return run


def train(
    recipe: str,
    dataset: Path,
    run: Path,
    *,
    hours: float,
    gpus: int,
    began: float,
    refresh_seconds: float = 60,
) -> dict[str, Any]:
    """Train until the run is complete or its time is over, with a plot of the loss; return the verdict.

    Args:
        recipe: YAML. hours: of the session, counted from `began` (`time.time()` in the first cell).

    Raises:
        UserError: training failed; the last lines that it printed are shown.
    """
    scratch, log = session.scratch_folder(session.ROOT), session.ROOT / "working" / "train.log"
    path = scratch / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    run.mkdir(parents=True, exist_ok=True)
    (run / "result.json").unlink(missing_ok=True)
    source = next(iter(inputs.checkpoints_of(run)), None)
    left = hours * 3600 - (time.time() - began)
    process = leg.start(leg.train_command(path, dataset, run, gpus), left, scratch, log)
    plot, deadline = LossPlot(run), time.monotonic() + left + 600
    while process.poll() is None:
        plot.draw()
        try:
            process.wait(refresh_seconds)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                process.terminate()
    plot.draw()
    verdict = leg.judge(run, process.returncode, source)
    leg.keep_within(session.ROOT / "working", 20_000_000_000)
    leg.write_verdict(session.ROOT / "working", verdict)
    if verdict["status"] == "failed":
        print("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
        raise UserError(f"training failed: {verdict['reason']}")
    print(
        f"{verdict['status']} at step {verdict['step']}, {human_count(verdict['tokens'])} tokens: {verdict['reason']}"
    )
    return verdict


class LossPlot:
    """The loss of a run, drawn in place again and again; without matplotlib, a line of text."""

    def __init__(self, run: Path) -> None:
        self._history, self._handle = run / "history.jsonl", None

    def draw(self) -> None:
        """Draw what the history holds now."""
        records = list(read_history(self._history)) if self._history.exists() else []
        training = [r for r in records if r["kind"] == "train"]
        if not training:
            return
        last = training[-1]
        speed, spent = human_count(last["tokens_per_second"]), human_duration(last["seconds"])
        title = f"step {last['step']}, loss {last['loss']:.4f}, {speed} tokens/s, {spent} trained"
        image = _picture(training, [r for r in records if r["kind"] == "eval"], title)
        if image is None:
            print(title)
        elif self._handle is None:
            from IPython.display import display

            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)


def _picture(training: list[dict[str, Any]], evaluations: list[dict[str, Any]], title: str) -> Any:
    """Return the curves as an image, None where there is no matplotlib."""
    try:
        from IPython.display import Image
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)", title=title)
    shown = training[:: max(1, len(training) // MAX_POINTS)]
    axes.plot([r["step"] for r in shown], [r["loss"] for r in shown], linewidth=0.8, label="training")
    for language in sorted({name for r in evaluations for name in r["languages"]}):
        points = [
            (r["step"], r["languages"][language]["loss"]) for r in evaluations if language in r["languages"]
        ]
        axes.plot(*zip(*points), marker="o", markersize=3, label=language)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return Image(buffer.getvalue())


def run_verb(*arguments: object) -> None:
    """Run one verb of Ekiden in a process of its own and print what it prints.

    Raises:
        UserError: it failed.
    """
    shown = " ".join(["ekiden", *map(str, arguments)])
    print(f"$ {shown}", flush=True)
    command = [sys.executable, "-u", "-m", "ekiden", *map(str, arguments)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise UserError(f"`{shown}` ended with status {done.returncode}; its message stands above")


def show_samples(run: Path) -> None:
    """Print the newest sample texts of each language."""
    from ekiden.quickstart import last_samples

    for language, text in last_samples(run).items():
        print(f"{language}: {text}\n")


def model_of(run: Path) -> Path:
    """Return the finished model of a run, or the best so far, or its newest checkpoint."""
    for path in (run / "final_model", run / "best"):
        if (path / "config.json").is_file():
            return path
    return inputs.checkpoints_of(run)[0]


def describe_verdict(verdict: dict[str, Any]) -> str:
    """Return what to do next."""
    if verdict["status"] == "completed":
        return "The run is complete: final_model/ is in the output of this version."
    return (
        "The run is paused. Save this version, then add its output as an input (Add Input, Your Work, this notebook) and "
        f"run all again: it goes on at step {verdict['step']}.\n{json.dumps(verdict['checkpoint'])}"
    )
