"""The verbs: parse, call one function, print. No logic.

Results go to stdout, progress and messages to stderr. A user's mistake is one sentence and status 1 or 2; the
traceback of a defect is shown with `ekiden --debug VERB ...`.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from ekiden import __version__
from ekiden.config import TrainConfig, build_config, field_help, field_types, preset_names
from ekiden.errors import UserError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        cli.main([a for a in arguments if a != "--debug"], prog_name="ekiden", standalone_mode=False)
    except click.ClickException as error:
        fail(error.format_message(), 2)
    except click.Abort:
        fail("interrupted", 130)
    except UserError as error:
        if debug:
            traceback.print_exc()
        fail(str(error), error.exit_code)
    except BrokenPipeError:
        os._exit(0)
    except Exception as error:
        if debug:
            traceback.print_exc()
        fail(describe_defect(error), 1)


def describe_defect(error: Exception) -> str:
    """Return one sentence for an exception that no module turned into a user's error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror.lower()}"
    return f"{type(error).__name__}: {error} (a defect; `ekiden --debug` before the verb shows where)"


def fail(sentence: str, status: int) -> None:
    """Print `sentence` to stderr and exit."""
    click.echo(f"ekiden: {' '.join(sentence.split())}", err=True)
    sys.exit(status)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="ekiden")
def cli() -> None:
    """Pretrain language models from scratch, in any language, on machines that will be taken away.

    After an interruption, run the same command again. `ekiden --debug VERB ...` shows tracebacks.
    """


@cli.command(context_settings=CONTEXT)
@click.option("--output-dir", default="quickstart", show_default=True, help="Folder for everything it makes.")
@click.option("--short", is_flag=True, help="A tenth of the steps: shows the path, learns little.")
def quickstart(output_dir: str, short: bool) -> None:
    """The whole path on built-in text, in minutes on a CPU.

    Example: ekiden quickstart --output-dir /tmp/first-run
    """
    from ekiden.quickstart import run_quickstart

    run_quickstart(Path(output_dir), short=short)


@cli.group(context_settings=CONTEXT)
def tokenizer() -> None:
    """Train a SentencePiece tokenizer."""


@tokenizer.command("train", context_settings=CONTEXT)
@click.argument("corpus", nargs=-1, required=True)
@click.option("--output", required=True, help="File to write, ending in .model.")
@click.option("--vocab-size", type=int, default=16000, show_default=True, help="Pieces in the vocabulary.")
@click.option(
    "--model-type",
    type=click.Choice(["unigram", "bpe"]),
    default="unigram",
    show_default=True,
    help="Algorithm.",
)
@click.option(
    "--temperature",
    type=float,
    default=0.5,
    show_default=True,
    help="Share of a language with n bytes of text: n to this power (1: as it is, 0: equal).",
)
@click.option("--language", help="Language of corpus arguments that are single files or flat folders.")
def tokenizer_train(**options: Any) -> None:
    """Train a tokenizer on CORPUS... (folders of languages, or files with --language).

    Example: ekiden tokenizer train corpus --output corpus.model --vocab-size 32000
    """
    from ekiden.tokenizer.train import train_tokenizer

    corpus = list(options.pop("corpus"))
    click.echo(str(train_tokenizer(corpus, **options)))


@cli.command(context_settings=CONTEXT)
@click.argument("corpus", nargs=-1, required=True)
@click.option("--tokenizer", required=True, help="SentencePiece .model, tokenizer folder or hub id.")
@click.option("--output-dir", required=True, help="Folder for the token shards.")
@click.option(
    "--dataset-size", help="Tokens to keep, as an unbiased sample: 10k, 1M, 100M, 1B, 10B. Default: all."
)
@click.option(
    "--test-split",
    type=float,
    default=0.002,
    show_default=True,
    help="Share of documents kept for evaluation; a small language keeps up to 5 %.",
)
@click.option("--num-proc", type=int, help="Worker processes. Default: one a core.")
@click.option("--language", help="Language of corpus arguments that are single files or flat folders.")
@click.option(
    "--txt-documents",
    type=click.Choice(["blank-line", "file"]),
    default="blank-line",
    show_default=True,
    help="What one document is in a .txt file: text between blank lines, or the whole file.",
)
def preprocess(**options: Any) -> None:
    """Turn CORPUS... into token shards; a killed build goes on where it was.

    Example: ekiden preprocess corpus --tokenizer corpus.model --output-dir shards
    """
    from ekiden.tokens.build import preprocess as build

    corpus = list(options.pop("corpus"))
    click.echo(build(corpus, **options).describe())


def train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` one option for every field of TrainConfig."""
    for name, kind in reversed(field_types().items()):
        if name == "preset":
            continue
        default = getattr(TrainConfig(), name)
        shown = f" [default: {default}]" if default not in ("", [], {}) else ""
        flag = "--" + name.replace("_", "-")
        settings: dict[str, Any] = {"default": None, "help": field_help()[name] + shown}
        if kind is bool:
            flag += "/--no-" + name.replace("_", "-")
        elif get_origin(kind) is list:
            settings |= {"multiple": True, "metavar": "TEXT"}
        else:
            settings["metavar"] = "|".join(get_args(kind)) if get_origin(kind) is Literal else metavar(kind)
        command = click.option(flag, name, **settings)(command)
    return command


def metavar(kind: Any) -> str:
    """Return how a value of type `kind` is shown in help."""
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(kind, "NAME=SHARE,...")


@cli.command(context_settings=CONTEXT)
@click.argument("recipe", required=False)
@click.option("--list-presets", is_flag=True, help="Print the presets and exit.")
@train_options
def train(recipe: str | None, list_presets: bool, **settings: Any) -> None:
    """Train RECIPE (a preset's name or a YAML file); run it again to resume.

    Defaults shown are the program's; a preset or recipe sets its own.

    Example: ekiden train gpt2-10m --dataset-path shards --output-dir run --max-steps 5000 --max-time 11h30m
    """
    if list_presets:
        click.echo("\n".join(preset_names()))
        return
    config = build_config(
        recipe, **{name: value for name, value in settings.items() if value not in (None, ())}
    )
    from ekiden.training.loop import train as run

    click.echo(json.dumps(vars(run(config))))


@cli.command(context_settings=CONTEXT)
@click.argument("model")
@click.option("--dataset-path", required=True, help="Folder of token shards.")
@click.option(
    "--max-tokens", type=int, help="Tokens of each language's test split to evaluate. Default: all."
)
@click.option("--batch-size", type=int, default=8, show_default=True, help="Samples evaluated at a time.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(model: str, dataset_path: str, as_json: bool, **options: Any) -> None:
    """Loss (nats a token), perplexity and bits per byte of MODEL, per language.

    MODEL is a run directory, a checkpoint or a Hugging Face folder.

    Example: ekiden evaluate run --dataset-path shards
    """
    from ekiden.evaluation.loss import evaluate_model, format_evaluation

    result = evaluate_model(model, dataset_path, **options)
    click.echo(json.dumps(result) if as_json else format_evaluation(result))


@cli.command(context_settings=CONTEXT)
@click.option("--model-path", required=True, help="Run directory, checkpoint or Hugging Face folder.")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; may be given several times.")
@click.option("--interactive", is_flag=True, help="Ask for prompts until /quit; /help lists the settings.")
@click.option(
    "--max-new-tokens",
    type=int,
    default=128,
    show_default=True,
    help="Length of the continuation, in tokens.",
)
@click.option(
    "--temperature",
    type=float,
    default=0.8,
    show_default=True,
    help="Randomness; 0: always the likeliest token.",
)
@click.option(
    "--top-k", type=int, default=0, show_default=True, help="Choose among the k likeliest tokens; 0: all."
)
@click.option(
    "--top-p",
    type=float,
    default=0.95,
    show_default=True,
    help="Choose among the likeliest tokens of this total probability.",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.1,
    show_default=True,
    help="Above 1: tokens seen before are less likely.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same text.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def generate(
    model_path: str, prompts: tuple[str, ...], interactive: bool, device: str, **settings: Any
) -> None:
    """Continue prompts with a trained model.

    Example: ekiden generate --model-path run --prompt "Once upon a time" --temperature 0.7
    """
    from ekiden.generation import run_generate

    run_generate(model_path, list(prompts), interactive=interactive, device=device, **settings)


@cli.group(context_settings=CONTEXT)
def checkpoint() -> None:
    """Look at the checkpoints of a run."""


@checkpoint.command("list", context_settings=CONTEXT)
@click.argument("run", type=click.Path())
def checkpoint_list(run: str) -> None:
    """Print step, tokens, size, age and state of each checkpoint of RUN; status 1 when none is good.

    Example: ekiden checkpoint list run
    """
    from ekiden.checkpoint.store import format_statuses

    table, good = format_statuses(Path(run))
    click.echo(table)
    sys.exit(0 if good else 1)


checkpoint.add_command(
    click.Command(
        "verify",
        callback=checkpoint_list.callback,
        params=checkpoint_list.params,
        help="The same as `list`: every byte of every checkpoint of RUN is read and compared with its hash.\n\n"
        "Example: ekiden checkpoint verify run",
    )
)
