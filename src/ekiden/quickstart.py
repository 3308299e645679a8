"""`ekiden quickstart`: the whole path on built-in text, minutes on a CPU, no download.

Text comes from the package's own sample corpus (English, Hindi, Konkani, Dutch) and from the documentation that the
installed standard library carries. Every stage is the command that a user would give, run as its own process: the
training really is stopped half-way by SIGTERM and really is resumed by the same command. What it makes stays in the
output folder, with the commands to look at it and the next command for one's own corpus.
"""

from __future__ import annotations

import ast
import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from ekiden.errors import UserError
from ekiden.progress import human_duration, say
from ekiden.training.history import read_history

STDLIB_BYTES = 600_000
"""English text taken from the standard library: with the sample corpus enough for some hundred steps."""
STEPS, SHORT_STEPS = 160, 16


def run_quickstart(folder: Path, short: bool = False) -> None:
    """Go the whole path in `folder`.

    Args:
        short: a tenth of the steps.

    Raises:
        UserError: a stage failed; the sentence names its command.
    """
    began = time.monotonic()
    if folder.exists() and any(folder.iterdir()) and not (folder / "corpus").is_dir():
        raise UserError(f"--output-dir {folder} holds other files; give an empty or new folder")
    shutil.rmtree(folder, ignore_errors=True)
    steps = SHORT_STEPS if short else STEPS
    corpus, model, shards, run = (
        folder / "corpus",
        folder / "tokenizer.model",
        folder / "shards",
        folder / "run",
    )
    write_corpus(corpus)
    ekiden("tokenizer", "train", corpus, "--output", model, "--vocab-size", 4000)
    ekiden("preprocess", corpus, "--tokenizer", model, "--output-dir", shards, "--test-split", 0.05)
    train = ["train", "gemma3-tiny", "--dataset-path", shards, "--output-dir", run, "--max-steps", steps]
    train += ["--log-steps", 1 if short else 10, "--eval-steps", steps // 2, "--save-steps", steps // 4]
    say(
        f"\nTraining, and stopping it half-way with SIGTERM, as a machine that is taken away would:\n  {shown(train)}"
    )
    stop_half_way(train, run, steps // 2)
    say(f"\nThe same command again:\n  {shown(train)}")
    ekiden(*train, quiet=True)
    ekiden("evaluate", run, "--dataset-path", shards)
    say("\nOne sample a language:")
    for language, text in last_samples(run).items():
        print(f"  {language}: {text}", flush=True)
    print(summary(folder, corpus, human_duration(time.monotonic() - began)), flush=True)


def write_corpus(corpus: Path) -> None:
    """Write the corpus: a folder a language, the sample corpus in each and the standard library's prose in English."""
    shutil.copytree(str(resources.files("ekiden") / "sample_corpus"), corpus)
    with (corpus / "english" / "standard-library.jsonl").open("w", encoding="utf-8") as file:
        size = 0
        for text in standard_library_prose():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            if size >= STDLIB_BYTES:
                break
    for language in sorted(path for path in corpus.iterdir() if path.is_dir()):
        total = sum(path.stat().st_size for path in language.iterdir())
        say(f"corpus/{language.name}: {total / 1000:.0f} KB")


def standard_library_prose() -> Iterator[str]:
    """Yield the longer documentation strings of the installed standard library, module by module."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) > 300:
                    yield text


def shown(arguments: list[object]) -> str:
    """Return the command as a user would type it."""
    return " ".join(["ekiden", *map(str, arguments)])


def ekiden(*arguments: object, quiet: bool = False) -> None:
    """Run one verb in a process of its own.

    Raises:
        UserError: it failed.
    """
    if not quiet:
        say(f"\n  {shown(list(arguments))}")
    status = subprocess.run([sys.executable, "-m", "ekiden", *map(str, arguments)], check=False).returncode
    if status != 0:
        raise UserError(f"`{shown(list(arguments))}` ended with status {status}; its message stands above")


def stop_half_way(train: list[object], run: Path, step: int) -> None:
    """Start training and send SIGTERM once `step` is in its history.

    Raises:
        UserError: it ended otherwise than paused.
    """
    process = subprocess.Popen([sys.executable, "-m", "ekiden", *map(str, train)])
    sent = False
    while process.poll() is None:
        reached = max(
            (r["step"] for r in read_history(run / "history.jsonl") if r["kind"] == "train"), default=0
        )
        if not sent and reached >= step:
            process.send_signal(signal.SIGTERM)
            sent = True
        time.sleep(0.1)
    status = (
        json.loads((run / "result.json").read_text())["status"]
        if (run / "result.json").exists()
        else "failed"
    )
    if process.returncode != 0 or not sent or status != "paused":
        raise UserError(
            f"`{shown(train)}` ended as {status} with status {process.returncode}; its message stands above"
        )


def last_samples(run: Path) -> dict[str, str]:
    """Return the newest sample text of each language in the history of `run`."""
    texts: dict[str, str] = {}
    for record in read_history(run / "history.jsonl"):
        if record["kind"] == "samples":
            texts = {
                language: f"{samples[0]['prompt']} >> {samples[0]['text']}".replace("\n", " ")
                for language, samples in record["languages"].items()
            }
    return texts


def summary(folder: Path, corpus: Path, duration: str) -> str:
    """Return the page that ends the quick start."""
    losses = [r["loss"] for r in read_history(folder / "run" / "history.jsonl") if r["kind"] == "train"]
    return f"""
Done in {duration}. Training loss {losses[0]:.2f} -> {losses[-1]:.2f} nats a token, over one interruption.

What was made, in {folder}:
  corpus/             a folder a language, JSONL files with "text"
  tokenizer.model     SentencePiece, 4,000 pieces
  shards/             the corpus as token ids, with its test split
  run/history.jsonl   every step, evaluation, sample and interruption
  run/checkpoints/    the newest checkpoints, each byte hashed
  run/best/           the model with the lowest evaluation loss
  run/final_model/    the finished model: a Hugging Face folder

Try it:
  ekiden generate --model-path {folder}/run --prompt "The river" --interactive
  ekiden checkpoint list {folder}/run

Your own corpus, a folder with one sub-folder a language of .jsonl, .txt or .parquet files:
  ekiden tokenizer train CORPUS --output my.model --vocab-size 16000
  ekiden preprocess CORPUS --tokenizer my.model --output-dir my-shards
  ekiden train gpt2-10m --dataset-path my-shards --output-dir my-run
After any interruption, give the last command again."""
