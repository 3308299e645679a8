"""The verbs that make token shards out of text: `tokenizer train`, `preprocess`."""

from __future__ import annotations

from typing import Any

import click

from ekiden.cli.common import CONTEXT


@click.group(context_settings=CONTEXT)
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


@click.command(context_settings=CONTEXT)
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
