"""The verbs that make token shards out of text: `tokenizer train`, `preprocess`, `corpus inspect`."""

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
    default=0.3,
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


NUM_PROC = click.option("--num-proc", type=int, help="Worker processes. Default: one a core.")
LANGUAGE = click.option(
    "--language", help="Language of corpus arguments that are single files, flat folders or hub datasets."
)
TXT_DOCUMENTS = click.option(
    "--txt-documents",
    type=click.Choice(["blank-line", "file"]),
    default="blank-line",
    show_default=True,
    help="What one document is in a .txt file: text between blank lines, or the whole file.",
)


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
@click.option(
    "--dedupe",
    type=click.Choice(["exact", "near"]),
    help="Leave out documents that stood before: with the same text, or also with nearly the same (Jaccard "
    "similarity of 16-character runs of 0.8 and more).",
)
@click.option(
    "--min-length", type=int, default=0, show_default=True, help="Leave out documents of fewer characters."
)
@click.option("--nfc", is_flag=True, help="Bring texts to Unicode's composed form (NFC).")
@NUM_PROC
@click.option(
    "--scheduler",
    help="Address of a Dask scheduler, such as tcp://10.0.0.5:8786; its workers must share this machine's files.",
)
@LANGUAGE
@TXT_DOCUMENTS
def preprocess(**options: Any) -> None:
    """Turn CORPUS... into token shards; a killed build goes on where it was.

    CORPUS is a folder of languages, a file or folder with --language, or
    LANGUAGE=hf://datasets/OWNER/NAME[@config][:split], which is read without being stored.

    Example: ekiden preprocess corpus --tokenizer corpus.model --output-dir shards
    """
    from ekiden.tokens.build import preprocess as build

    corpus = list(options.pop("corpus"))
    click.echo(build(corpus, **options).describe())


@click.group(context_settings=CONTEXT)
def corpus() -> None:
    """Look at a corpus."""


@corpus.command("inspect", context_settings=CONTEXT)
@click.argument("corpus", nargs=-1, required=True)
@click.option("--tokenizer", help="SentencePiece .model, tokenizer folder or hub id, to count tokens.")
@click.option(
    "--token-budget", help="Tokens of the run that is planned: 100M, 1B. Default: as many as there are."
)
@click.option(
    "--verify", is_flag=True, help="Compare the hash of every file of token shards first, as after a copy."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--plot", help="Write the mixtures to this .html file.")
@NUM_PROC
@LANGUAGE
@TXT_DOCUMENTS
def corpus_inspect(as_json: bool, plot: str | None, **options: Any) -> None:
    """Show what each language of CORPUS... (or a folder of token shards) holds, and the share and epochs that each
    --temperature would give it.

    Example: ekiden corpus inspect shards --token-budget 1B
    """
    from ekiden.tokens.inspect import check_plot, inspect

    if plot is not None:
        check_plot(plot)
    inspection = inspect(list(options.pop("corpus")), **options)
    click.echo(inspection.as_json() if as_json else inspection.describe())
    if plot is not None:
        inspection.plot(plot)
