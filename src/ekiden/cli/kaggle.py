"""The verbs of Kaggle: `kaggle corpus upload`, `push`, `notebook`, `relay`, `status`, `pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ekiden.cli.common import CONTEXT
from ekiden.values import parse_bytes, parse_duration

RELAY_DIR = click.option(
    "--relay-dir",
    default="relay",
    show_default=True,
    help="Folder of the relay: its state and what it brings home.",
)
PART_SIZE = click.option(
    "--max-part-size", default="5GB", show_default=True, help="Bytes of one dataset at most: 5GB, 500MB."
)
STAGING = click.option(
    "--staging", help="Folder in which one part at a time is written. Default: a temporary one."
)


@click.group(context_settings=CONTEXT)
def kaggle() -> None:
    """Train on Kaggle over as many sessions as it takes.

    Needs `pip install 'ekiden[kaggle]'` and Kaggle's own sign-in (KAGGLE_API_TOKEN, or `kaggle auth login`).
    """


@kaggle.group(context_settings=CONTEXT)
def corpus() -> None:
    """Bring a corpus to Kaggle."""


@corpus.command("upload", context_settings=CONTEXT)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--name", required=True, help="The datasets are NAME-1, NAME-2, ...: small letters, digits, hyphens."
)
@click.option("--tokenizer", help="Preprocess FOLDER with it first. Default: FOLDER is packed as it is.")
@click.option("--output-dir", help="Where --tokenizer puts the token shards. Default: FOLDER-shards.")
@PART_SIZE
@STAGING
def corpus_upload(
    folder: Path,
    name: str,
    tokenizer: str | None,
    output_dir: str | None,
    max_part_size: str,
    staging: str | None,
) -> None:
    """Upload FOLDER (token shards, or text) as private datasets; a broken upload goes on when given again.

    Example: ekiden kaggle corpus upload shards --name my-corpus
    """
    if tokenizer:
        from ekiden.tokens.build import preprocess

        target = output_dir or f"{str(folder).rstrip('/')}-shards"
        click.echo(preprocess([str(folder)], tokenizer, target).describe(), err=True)
        folder = Path(target)
    click.echo(",".join(_upload(folder, name, max_part_size, staging)))


@kaggle.command(context_settings=CONTEXT)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--name", required=True, help="The datasets are NAME-1, NAME-2, ...: small letters, digits, hyphens."
)
@PART_SIZE
@STAGING
def push(path: Path, name: str, max_part_size: str, staging: str | None) -> None:
    """Upload any folder or file as private datasets: a tokenizer, a checkpoint, a wheel, final_model/.

    Example: ekiden kaggle push run/final_model --name my-model
    """
    click.echo(",".join(_upload(path, name, max_part_size, staging)))


def _upload(path: Path, name: str, max_part_size: str, staging: str | None) -> list[str]:
    from ekiden.kaggle.client import Kaggle
    from ekiden.kaggle.upload import upload

    size = parse_bytes(max_part_size, "--max-part-size") or 0
    return upload(path, name, Kaggle(), max_part_bytes=size, staging=Path(staging) if staging else None)


CORPUS = click.option(
    "--corpus", "refs", default="", help="What `kaggle corpus upload` printed: owner/name-1,owner/name-2."
)
TOKEN_BUDGET = click.option(
    "--token-budget", help="Tokens of the whole run: 500M, 2B. Default: the recipe's max_steps or epochs."
)
GPUS = click.option(
    "--gpus",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="GPUs a session must have; 0: train on the CPU.",
)


@kaggle.command(context_settings=CONTEXT)
@click.argument("recipe", required=False)
@click.option("--output", required=True, help="File to write, ending in .ipynb.")
@click.option("--title", help="Default: the file's name.")
@CORPUS
@TOKEN_BUDGET
@GPUS
@click.option(
    "--vocab-size",
    type=int,
    default=16_000,
    show_default=True,
    help="Of the tokenizer, where the corpus is text.",
)
@click.option(
    "--prompt", "prompts", multiple=True, help="Text to continue at the end; may be given several times."
)
@click.option(
    "--package",
    type=click.Choice(["embed", "input"]),
    default="embed",
    show_default=True,
    help="Ekiden itself: inside the notebook, or a wheel in your dataset ekiden-wheel.",
)
def notebook(recipe: str | None, output: str, refs: str, prompts: tuple[str, ...], **options: Any) -> None:
    """Write a notebook for RECIPE (a preset's name or a YAML file), to be uploaded to Kaggle and run there.

    Example: ekiden kaggle notebook gpt2-10m --corpus me/my-corpus-1 --output train.ipynb
    """
    from ekiden.kaggle.notebook import write_notebook

    corpus = [ref for ref in refs.split(",") if ref]
    click.echo(str(write_notebook(recipe, output, corpus=corpus, prompts=list(prompts), **options)))


@kaggle.command(context_settings=CONTEXT)
@click.argument("recipe", required=False)
@RELAY_DIR
@CORPUS
@TOKEN_BUDGET
@GPUS
@click.option("--name", help="The scripts are NAME-a, NAME-b, NAME-c. Default: the recipe's name.")
@click.option(
    "--accelerator", default="NvidiaTeslaT4", show_default=True, help="Kaggle's name of the machine."
)
@click.option("--leg-time", default="11h", show_default=True, help="Length of a leg, of Kaggle's 12 hours.")
@click.option(
    "--poll-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Between two looks at a session.",
)
def relay(
    recipe: str | None, relay_dir: str, refs: str, leg_time: str, poll_seconds: float, **options: Any
) -> None:
    """Train RECIPE (a preset's name or a YAML file) on Kaggle until its budget is reached; given again, it goes on.

    Example: ekiden kaggle relay gpt2-10m --corpus me/my-corpus-1 --token-budget 1B
    """
    from ekiden.kaggle.client import Kaggle
    from ekiden.kaggle.relay import LEG_SECONDS, Patience, run_relay
    from ekiden.kaggle.results import describe

    state = run_relay(
        recipe,
        relay_dir,
        Kaggle(),
        corpus=[ref for ref in refs.split(",") if ref],
        leg_seconds=int(parse_duration(leg_time, "--leg-time") or LEG_SECONDS),
        patience=Patience(poll=poll_seconds),
        **options,
    )
    click.echo(describe(state, None))


@kaggle.command(context_settings=CONTEXT)
@RELAY_DIR
@click.option("--offline", is_flag=True, help="What is known here; do not ask Kaggle for the quota.")
def status(relay_dir: str, offline: bool) -> None:
    """Show a relay's legs, tokens, loss, quota, and how many sessions and days are left.

    Example: ekiden kaggle status
    """
    from ekiden.kaggle.results import describe, load_relay, quota_now

    state = load_relay(relay_dir)
    click.echo(describe(state, None if offline or not state.settings.gpus else quota_now()))


@kaggle.command(context_settings=CONTEXT)
@RELAY_DIR
@click.option("--output-dir", help="Run directory to bring it to. Default: RELAY_DIR/run.")
def pull(relay_dir: str, output_dir: str | None) -> None:
    """Bring the newest checkpoint, the history and the models of a relay home, verified.

    Example: ekiden kaggle pull --output-dir run
    """
    from ekiden.kaggle.client import Kaggle
    from ekiden.kaggle.results import pull as bring

    click.echo(str(bring(relay_dir, Kaggle(), output_dir)))
