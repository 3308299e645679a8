"""`ekiden kaggle notebook`: a notebook that a person uploads to Kaggle and runs, again and again until the run is done.

It is written from the cells below: text for people, and short code that calls `interactive`. The package travels in it,
compressed, or is found as a wheel among the inputs. Nothing secret is in it; nothing is fetched while it runs unless the
image lacks a module.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.config import build_config
from ekiden.errors import UsageError
from ekiden.kaggle.launcher import packed_package
from ekiden.values import to_int

INTRODUCTION = """
# {title}

This notebook trains a language model from scratch with Ekiden, over as many Kaggle sessions as it takes. Every
session goes on where the one before stopped: the same data order, the same weights.

**Before the first run** (once):
1. *Settings, Accelerator*: **{accelerator}**.
2. *Add Input*: the corpus, {corpus_text}. It is made on your own machine with
   `ekiden kaggle corpus upload my-folder --name my-corpus`: token shards, or a folder with one sub-folder a language.
{package_text}
Then *Save Version, Save & Run All*. The session ends by itself, with a checkpoint, before Kaggle would end it.

**Every further session**: *Add Input, Your Work*: the output of this notebook's last version. Save & Run All again.
The last cells show samples in every language and export the model.
"""

SETTINGS = """
# What you may change. RECIPE takes every setting of `ekiden train` (`ekiden train --help`).
CORPUS = {corpus!r}  # datasets, owner/name; empty: the first corpus among the inputs
GPUS = {gpus}  # that the session must have; 0: train on a CPU
HOURS = 11.0  # of Kaggle's 12, from here: the last checkpoint and saving the output need time, too
VOCAB_SIZE = {vocab_size}  # of the tokenizer that is trained where the corpus is text
PROMPTS = {prompts!r}
RECIPE = \"\"\"
{recipe}\"\"\"
"""

GPU_TEXT = """
## The machine
Kaggle sometimes gives a CPU without a word, and a CPU would spend the session on nothing. So this comes first.
"""

GPU_CHECK = """
import shutil, subprocess, time

BEGAN = time.time()
listed = ""
if shutil.which("nvidia-smi"):
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
print(listed or "no GPU")
if listed.count("GPU ") < GPUS:
    raise SystemExit(f"{GPUS} GPUs are needed: choose the accelerator in the settings, or set GPUS = 0")
"""

INSTALL_TEXT = """
## Ekiden
{where} The image's own torch and transformers stay as they are; only modules that it lacks would be installed.
"""

INSTALL_EMBEDDED = """
import base64, io, os, sys, tempfile, zipfile

PACKAGE = "{package}"
folder = tempfile.mkdtemp(prefix="ekiden-")
zipfile.ZipFile(io.BytesIO(base64.b85decode(PACKAGE))).extractall(folder)
"""

INSTALL_INPUT = """
import glob, os, sys, tempfile, zipfile

root = os.path.join(os.environ.get("EKIDEN_KAGGLE_ROOT", "/kaggle"), "input")
names = ("ekiden-wheel-00000.bin", "ekiden-*.whl")
found = [path for depth in (1, 2, 3) for name in names for path in glob.glob(os.path.join(root, *["*"] * depth, name))]
if not found:
    raise SystemExit("add your dataset ekiden-wheel as an input (see the first cell)")
folder = tempfile.mkdtemp(prefix="ekiden-")
zipfile.ZipFile(found[0]).extractall(folder)
"""

INSTALL_END = """
sys.path.insert(0, folder)
os.environ["PYTHONPATH"] = folder + os.pathsep + os.environ.get("PYTHONPATH", "")

from ekiden.kaggle import session

session.install_missing()
import ekiden, torch, transformers
from ekiden.kaggle import interactive

print(f"ekiden {ekiden.__version__} from {os.path.dirname(ekiden.__file__)}")
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
"""

DATA_TEXT = """
## The corpus and the run so far
The corpus is looked for under both places where Kaggle mounts inputs, and checked by its hashes. If an earlier version's
output is among the inputs, its newest checkpoint is verified and carried forward before anything else happens.
"""
DATA = """
dataset = interactive.find_dataset(CORPUS, VOCAB_SIZE)
run = interactive.take_up()
"""

TRAIN_TEXT = """
## Training
`ekiden train` runs as a process of its own, with a process for each GPU; what it prints is in `train.log`. The curve is
drawn anew every minute: the training loss, and the loss of each language's test split.
"""
TRAIN = """
verdict = interactive.train(RECIPE, dataset, run, hours=HOURS, gpus=GPUS, began=BEGAN)
"""

SAMPLES_TEXT = """
## What it writes
Continuations of each language's test documents, then of your own prompts.
"""
SAMPLES = """
interactive.show_samples(run)
model = interactive.model_of(run)
prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
if prompts:
    interactive.run_verb("generate", "--model-path", model, "--max-new-tokens", 60, *prompts)
"""

EXPORT_TEXT = """
## The model
A Hugging Face folder, which `transformers` loads as it is.
"""
EXPORT = """
interactive.run_verb("export", model, "--format", "hf", "--output", session.ROOT / "working" / "model")
print(interactive.describe_verdict(verdict))
"""

PACKAGE_TEXT = """3. *Add Input*: your dataset **ekiden-wheel**, made once with `pip wheel --no-deps PATH-TO-EKIDEN` and
   `ekiden kaggle push ekiden-0.1.0-py3-none-any.whl --name ekiden-wheel`.
"""


def write_notebook(
    recipe: str | None,
    output: str | Path,
    *,
    corpus: list[str],
    title: str | None = None,
    token_budget: str | None = None,
    gpus: int = 2,
    vocab_size: int = 16_000,
    prompts: list[str] | None = None,
    package: str = "embed",
) -> Path:
    """Write a notebook that trains `recipe` (a preset's name or a YAML file); return its path.

    Args:
        corpus: datasets (owner/name); none: the first corpus among the inputs. package: "embed" puts Ekiden into the
            notebook, "input" has it found as a wheel among the inputs.

    Raises:
        UsageError: a recipe, budget or file name that cannot be used.
    """
    output = Path(output)
    if output.suffix != ".ipynb":
        raise UsageError(f"--output {output} must end in .ipynb")
    value = notebook(
        title or output.stem,
        recipe_text(recipe, token_budget, gpus),
        corpus,
        gpus,
        vocab_size,
        prompts or [],
        package,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(output, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
    return output


def recipe_text(recipe: str | None, token_budget: str | None, gpus: int) -> str:
    """Return the recipe as a person would write it: the preset's name or the file's text, and the budget's steps."""
    config = build_config(recipe)
    text = f"preset: {config.preset}\n"
    if recipe and Path(recipe).suffix in (".yaml", ".yml"):
        text = Path(recipe).read_text(encoding="utf-8").strip() + "\n"
    if token_budget:
        try:
            tokens = to_int(token_budget)
        except ValueError:
            raise UsageError(
                f"--token-budget must be a count such as 500M or 2B, not {token_budget!r}"
            ) from None
        samples = config.samples_per_step(max(1, gpus))
        steps = math.ceil(tokens / (samples * config.max_length))
        text = re.sub(r"(?m)^max_steps:.*\n", "", text) + f"max_steps: {steps}  # {token_budget} tokens\n"
    return text


def notebook(
    title: str,
    recipe: str,
    corpus: list[str],
    gpus: int,
    vocab_size: int,
    prompts: list[str],
    package: str,
) -> dict[str, Any]:
    """Return the notebook in Jupyter's format 4.5."""
    embedded = package == "embed"
    corpus_text = (
        " and ".join(f"**{ref}**" for ref in corpus) or "any dataset that `ekiden kaggle corpus upload` made"
    )
    introduction = INTRODUCTION.format(
        title=title,
        accelerator="GPU T4 x2" if gpus else "None",
        corpus_text=corpus_text,
        package_text="" if embedded else PACKAGE_TEXT,
    )
    settings = SETTINGS.format(
        corpus=corpus, gpus=gpus, vocab_size=vocab_size, prompts=prompts, recipe=recipe
    )
    install = INSTALL_EMBEDDED.format(package=packed_package()) if embedded else INSTALL_INPUT
    where = "It is inside the next cell." if embedded else "It is found among the inputs."
    cells = [
        _cell("markdown", "introduction", introduction),
        _cell("code", "settings", settings),
        _cell("markdown", "machine-text", GPU_TEXT),
        _cell("code", "machine", GPU_CHECK),
        _cell("markdown", "install-text", INSTALL_TEXT.format(where=where)),
        _cell("code", "install", install.rstrip("\n") + INSTALL_END),
        _cell("markdown", "corpus-text", DATA_TEXT),
        _cell("code", "corpus", DATA),
        _cell("markdown", "training-text", TRAIN_TEXT),
        _cell("code", "training", TRAIN),
        _cell("markdown", "samples-text", SAMPLES_TEXT),
        _cell("code", "samples", SAMPLES),
        _cell("markdown", "export-text", EXPORT_TEXT),
        _cell("code", "export", EXPORT),
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _cell(kind: str, name: str, text: str) -> dict[str, Any]:
    source = textwrap.dedent(text).strip().splitlines(keepends=True)
    cell: dict[str, Any] = {"cell_type": kind, "id": name, "metadata": {}, "source": source}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
        if name == "settings":
            cell["metadata"] = {"tags": ["parameters"]}
    return cell
