"""The verbs that use a trained model: `evaluate`, `generate`, `export`."""

from __future__ import annotations

from typing import Any

import click

from ekiden.cli.common import CONTEXT


@click.command(context_settings=CONTEXT)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--dataset-path", help="Folder of token shards, for the loss.")
@click.option(
    "--max-tokens", type=int, help="Tokens of each language's test split to evaluate. Default: all."
)
@click.option(
    "--harness",
    metavar="TASKS",
    help="Tasks of lm-evaluation-harness, by name or YAML file, separated by commas; needs 'ekiden[harness]'.",
)
@click.option("--harness-limit", type=int, help="Questions of each task at most. Default: all.")
@click.option("--harness-fewshot", type=int, help="Solved examples before a question. Default: the task's.")
@click.option(
    "--batch-size", type=int, default=8, show_default=True, help="Samples or questions evaluated at a time."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON object a line and model instead of a table."
)
@click.option("--output", help="File that takes what would be printed.")
def evaluate(models: tuple[str, ...], **options: Any) -> None:
    """Loss (nats a token), perplexity and bits per byte of each MODEL, per language; scores on tasks.

    MODEL is a run directory, a checkpoint or a Hugging Face folder. Several are compared in one table.

    Example: ekiden evaluate run --dataset-path shards

    Example: ekiden evaluate run/checkpoints/step-* --dataset-path shards --harness arc_easy --output table.txt
    """
    from ekiden.evaluation.comparison import run_evaluate

    run_evaluate(models, **options)


@click.command(context_settings=CONTEXT)
@click.option(
    "--model-path",
    "models",
    required=True,
    multiple=True,
    help="Run directory, checkpoint or Hugging Face folder; several are shown side by side.",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to continue; may be given several times; -: standard input.",
)
@click.option(
    "--prompt-file",
    "prompt_files",
    multiple=True,
    help='Prompts, one a line, or a .jsonl file with "prompt"; -: the lines of standard input.',
)
@click.option("--interactive", is_flag=True, help="Ask for prompts until /quit; /help lists the settings.")
@click.option("--max-new-tokens", type=int, help="Tokens of the continuation at most.  [default: 128]")
@click.option("--temperature", type=float, help="Randomness; 0: always the likeliest token.  [default: 0.8]")
@click.option("--top-k", type=int, help="Choose among the k likeliest tokens; 0: all.  [default: 0]")
@click.option(
    "--top-p",
    type=float,
    help="Choose among the likeliest tokens of this total probability.  [default: 0.95]",
)
@click.option(
    "--min-p",
    type=float,
    help="Choose among tokens of at least this share of the likeliest one's probability.  [default: 0]",
)
@click.option(
    "--repetition-penalty",
    type=float,
    help="Above 1: tokens seen before are less likely.  [default: 1.1]",
)
@click.option("--seed", type=int, help="Same seed, same text.  [default: 0]")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Prompts computed together.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto (all GPUs there are, for more than one batch), cpu, cuda or cuda:N.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help='JSON lines {"model", "step", "prompt", "text", "tokens", "seed"}.',
)
@click.option("--output", help="File that takes what would be printed.")
@click.option(
    "--benchmark",
    is_flag=True,
    help="Measure reading and writing speed, time to the first token and memory; the last line is JSON.",
)
@click.option("--benchmark-batch-sizes", help="Separated by commas.  [default: 1,4,16]")
@click.option("--benchmark-prompt-lengths", help="In tokens, separated by commas.  [default: 16,128,512]")
def generate(
    models: tuple[str, ...],
    prompts: tuple[str, ...],
    prompt_files: tuple[str, ...],
    benchmark: bool,
    benchmark_batch_sizes: str | None,
    benchmark_prompt_lengths: str | None,
    **options: Any,
) -> None:
    """Continue prompts with trained models. What is piped in is one prompt, where no other is given.

    Example: ekiden generate --model-path run --prompt "Once upon a time" --temperature 0.7

    Example: ekiden generate --model-path run-a --model-path run-b --prompt-file prompts.txt --json
    """
    from ekiden.generation import run_benchmark, run_generate

    if benchmark:
        unused = {
            "--prompt": prompts,
            "--prompt-file": prompt_files,
            "--interactive": options.pop("interactive"),
        }
        del options["batch_size"]
        run_benchmark(
            list(models),
            benchmark_batch_sizes,
            benchmark_prompt_lengths,
            unused=[flag for flag, given in unused.items() if given],
            **options,
        )
    else:
        run_generate(list(models), list(prompts), list(prompt_files), **options)


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
