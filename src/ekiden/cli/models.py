"""The verbs that use a trained model: `evaluate`, `generate`, `export`."""

from __future__ import annotations

import json
from typing import Any

import click

from ekiden.cli.common import CONTEXT


@click.command(context_settings=CONTEXT)
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


@click.command(context_settings=CONTEXT)
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


@click.command(context_settings=CONTEXT)
@click.argument("model")
@click.option(
    "--format",
    "output_format",
    required=True,
    help="hf: folder for transformers; gguf: file for llama.cpp; gemma-pytorch: .ckpt for google/gemma_pytorch.",
)
@click.option("--output", required=True, help="Folder (hf) or file to write: NAME.gguf, NAME.ckpt.")
@click.option(
    "--dtype",
    default="fp32",
    show_default=True,
    help="Of the stored weights: fp32, bf16, fp16; with gguf also q8_0.",
)
@click.option(
    "--check-text",
    help="gguf: .txt, .jsonl or .parquet file on which llama.cpp's tokens are compared with the model's before the file "
    "counts. Default: the run's test split.",
)
@click.option(
    "--push-to-hub",
    "push_repository",
    metavar="OWNER/NAME",
    help="Upload the result; a new repository is private.",
)
def export(model: str, **options: Any) -> None:
    """Write MODEL in the format of another program.

    MODEL is a run directory, a checkpoint or a Hugging Face folder.

    Example: ekiden export run --format gguf --output model.gguf --dtype q8_0
    """
    from ekiden.export.command import export_model

    for line in export_model(model, **options):
        click.echo(line)
