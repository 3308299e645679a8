"""Loss, perplexity and bits per byte of a model on the test split, language by language.

Takes a model and token shards; the training loop calls `evaluate` every `eval_steps` and writes what it returns
into the history, `ekiden evaluate` calls `evaluate_model`. Nothing is drawn at random: the same weights on the same
device give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ekiden.errors import UserError
from ekiden.export.load import LoadedModel, load_model
from ekiden.modeling.attention_choice import install_as_trained
from ekiden.modeling.build import head_weight, hidden_states, inside_forward
from ekiden.modeling.device import Precision, select_precision
from ekiden.modeling.loss import IGNORE, chunked_cross_entropy
from ekiden.tokenizer.load import Tokenizer
from ekiden.tokens.format import TokenDataset, TokenStream

LONGEST = 8192
"""Window of a model from elsewhere whose context is longer: 131,072 tokens of attention fit few devices."""
UNIGRAM_CHUNK, UNIGRAM_CHUNKS = 1 << 20, 64
"""Training tokens counted for the unigram model: 64 pieces of 2^20, evenly spread, under a second."""

Figures = dict[str, Any]


def evaluate(
    model: torch.nn.Module,
    dataset: TokenDataset,
    length: int,
    tokens_per_language: int | None = None,
    batch_size: int = 8,
    precision: Precision | None = None,
    chunk_rows: int = 1024,
) -> dict[str, Any]:
    """Return the figures of `model` on the test split of every language, on the model's own device.

    A split is read in order in windows of `length` predictions, so that each of its tokens but the very first is
    predicted once, from at most `length` tokens before it.

    Args:
        length: tokens a window predicts; the model's context.
        tokens_per_language: predict only this many from the beginning of each split; None: all.
        batch_size: windows at a time; changes the figures in the last bits at most.
        precision: of the matrix products; None: fp32.
        chunk_rows: positions whose logits exist at one time.

    Returns:
        {"languages": {LANG: {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}}, "macro", "micro"}.
        loss: mean nats a token; perplexity: exp(loss); bits_per_byte: loss / ln 2 * tokens / bytes, comparable
        between tokenizers; tokens: predicted; bytes: UTF-8 bytes of their text. Where not the whole split is
        predicted, bytes are its tokens' share of the whole split's, by count. A language without test tokens
        stands there with 0 tokens and None for the rest. macro: the mean over languages; micro: over all predicted
        tokens; both are empty where there are none.
    """
    was_training = model.training
    model.eval()
    try:
        languages = {
            name: _of_split(
                model,
                dataset.split(name, "test"),
                length,
                tokens_per_language,
                batch_size,
                precision,
                chunk_rows,
            )
            for name in dataset.languages
        }
    finally:
        model.train(was_training)
    return {"languages": languages, **_averages(list(languages.values()))}


@torch.no_grad()
def _of_split(
    model: torch.nn.Module,
    stream: TokenStream,
    length: int,
    limit: int | None,
    batch_size: int,
    precision: Precision | None,
    chunk_rows: int,
) -> Figures:
    """Return the figures of one split."""
    whole = max(0, stream.tokens - 1)
    count = whole if limit is None else min(limit, whole)
    if count == 0:
        return _figures(None, 0, 0)
    device = head_weight(model).device
    dtype = precision.dtype if precision else torch.float32
    # float64 on the device: no waiting for it between batches.
    nats = torch.zeros((), dtype=torch.float64, device=device)

    def loss(input_ids: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        hidden = hidden_states(model, input_ids)
        return chunked_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), head_weight(model), target_ids.reshape(-1), chunk_rows
        )

    for inputs, targets in windows(stream, count, length, batch_size):
        input_ids, target_ids = (torch.from_numpy(array).to(device) for array in (inputs, targets))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            nats += inside_forward(model, loss, input_ids, target_ids)
    return _figures(float(nats) / count, count, round(stream.bytes * count / whole))


def windows(
    stream: TokenStream, count: int, length: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (inputs, targets), int64 [b, T], that predict tokens 1 to `count` of a stream once each, in order.

    The last window is filled up with its last token and targets that count nothing; what stands after a token
    does not reach it. (Filled with the padding id, transformers would warn of a missing mask.) T is `length`, or
    all of a shorter text.
    """
    length = min(length, count)
    for first in range(0, count, batch_size * length):
        last = min(count, first + batch_size * length)
        rows = -(-(last - first) // length)
        tokens = stream.read(first, last - first + 1)
        inputs = np.full(rows * length, tokens[-1])
        targets = np.full(rows * length, IGNORE, dtype=np.int64)
        inputs[: last - first], targets[: last - first] = tokens[:-1], tokens[1:]
        yield inputs.reshape(rows, length), targets.reshape(rows, length)


def _figures(loss: float | None, tokens: int, size: int) -> Figures:
    """Return one row of the result; `size` in bytes."""
    bits = loss / math.log(2) * tokens / size if loss is not None and size else None
    perplexity = None if loss is None else _exp(loss)
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "tokens": tokens, "bytes": size}


def _exp(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)


def _averages(rows: list[Figures]) -> dict[str, Figures]:
    """Return the mean over languages and the mean over tokens."""
    rows = [row for row in rows if row["tokens"]]
    if not rows:
        return {"macro": {}, "micro": {}}
    loss = math.fsum(row["loss"] for row in rows) / len(rows)
    bits = [row["bits_per_byte"] for row in rows if row["bits_per_byte"] is not None]
    macro = {
        "loss": loss,
        "perplexity": _exp(loss),
        "bits_per_byte": math.fsum(bits) / len(bits) if bits else None,
    }
    tokens, size = sum(row["tokens"] for row in rows), sum(row["bytes"] for row in rows)
    return {
        "macro": macro,
        "micro": _figures(math.fsum(r["loss"] * r["tokens"] for r in rows) / tokens, tokens, size),
    }


def unigram_cross_entropy(dataset: TokenDataset, language: str, tokens: int | None = None) -> float | None:
    """Return the cross-entropy of the test split under the frequencies of the training tokens, in nats a token.

    What a model reaches that knows how often tokens occur and nothing of their order; every piece of the vocabulary
    is counted once more than it occurs (Laplace). Frequencies are of 67 million training tokens at most.

    Args:
        tokens: the same as `evaluate`'s `tokens_per_language`.

    Returns:
        None where there are no test tokens.
    """
    test = dataset.split(language, "test")
    count = max(0, test.tokens - 1) if tokens is None else min(tokens, test.tokens - 1)
    if count <= 0:
        return None
    frequencies = _token_counts(dataset.split(language, "train"), dataset.vocab_size) + 1
    negative_logs = -np.log(frequencies / frequencies.sum())
    total = math.fsum(
        float(negative_logs[test.read(first, min(UNIGRAM_CHUNK, count + 1 - first))].sum())
        for first in range(1, count + 1, UNIGRAM_CHUNK)
    )
    return total / count


def _token_counts(stream: TokenStream, vocab_size: int) -> np.ndarray:
    """Return how often each id occurs, int64 [V], in evenly spread pieces of the stream where it is long."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    chunks = -(-stream.tokens // UNIGRAM_CHUNK)
    for chunk in range(0, chunks, max(1, -(-chunks // UNIGRAM_CHUNKS))):
        first = chunk * UNIGRAM_CHUNK
        piece = stream.read(first, min(UNIGRAM_CHUNK, stream.tokens - first))
        counts += np.bincount(piece, minlength=vocab_size)
    return counts


def evaluate_model(
    model: str | Path,
    dataset_path: str | Path,
    max_tokens: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """Return what `evaluate` returns for the model at a path, each language with the `unigram_loss` to compare with.

    Args:
        model: run directory, checkpoint or Hugging Face folder.
        dataset_path: folder of token shards; its test split is evaluated.
        max_tokens: of each language's test split; None: all.

    Raises:
        UserError: model or shards are missing, or do not belong together.
    """
    return evaluate_loaded(load_model(model, device), TokenDataset.open(dataset_path), max_tokens, batch_size)


def evaluate_loaded(
    loaded: LoadedModel, dataset: TokenDataset, max_tokens: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """Return what `evaluate_model` returns, for a model and shards that are open.

    A model that was trained with documents masked from each other is evaluated so, too.

    Raises:
        UserError: they do not belong together.
    """
    check_tokenizer(loaded.tokenizer, loaded.path, dataset)
    precision = select_precision(head_weight(loaded.model).device, "auto")
    install_as_trained(loaded.model, precision)
    result = evaluate(
        loaded.model,
        dataset,
        length=min(LONGEST, int(loaded.model.config.max_position_embeddings)),
        tokens_per_language=max_tokens,
        batch_size=batch_size,
        precision=precision,
    )
    for language, figures in result["languages"].items():
        figures["unigram_loss"] = unigram_cross_entropy(dataset, language, max_tokens)
    return result


def check_tokenizer(tokenizer: Tokenizer, model: Path, dataset: TokenDataset) -> None:
    """Refuse shards whose ids mean other pieces than the model's.

    Files may differ and the ids be the same (a SentencePiece model and its conversion), so text decides: most of
    the first documents must give the same ids. Not all, for a conversion decides exact ties of a unigram model
    otherwise; another tokenizer agrees on next to none.

    Raises:
        UserError: the tokenizers differ.
    """
    if tokenizer.sha256 == dataset.tokenizer_sha256:
        return
    of_shards = dataset.tokenizer()
    texts = [
        of_shards.decode(dataset.split(language, split).document(0)[:512].tolist())
        for language in dataset.languages
        for split in ("train", "test")
        if dataset.split(language, split).documents
    ]
    pairs = zip(tokenizer.encode_batch(texts), of_shards.encode_batch(texts))
    same = sum(np.array_equal(found, expected) for found, expected in pairs)
    if tokenizer.vocab_size != of_shards.vocab_size or 2 * same < len(texts):
        raise UserError(
            f"--dataset-path {dataset.path} was made with another tokenizer than {model} was trained with; "
            f"preprocess the text with --tokenizer {model}"
        )


def format_evaluation(result: dict[str, Any]) -> str:
    """Return a table of what `evaluate` returned: a row a language, then the averages where there are several."""
    rows = dict(result["languages"])
    if len(rows) > 1:
        rows |= {
            name: result[key]
            for key, name in (("macro", "mean of languages"), ("micro", "mean of tokens"))
            if result[key]
        }
    width = max([len(name) for name in rows] + [len("language")]) + 2
    baseline = any("unigram_loss" in row for row in rows.values())
    head = f"{'language':<{width}}{'loss':>9}{'perplexity':>13}{'bits/byte':>11}{'tokens':>13}"
    lines = [head + (f"{'unigram loss':>14}" if baseline else "")]
    for name, row in rows.items():
        if row["loss"] is None:
            lines.append(
                f"{name:<{width}} no test tokens: preprocess with a larger --test-split to evaluate it"
            )
            continue
        line = f"{name:<{width}}{row['loss']:>9.4f}{_short(row['perplexity']):>13}"
        line += f"{'-' if row['bits_per_byte'] is None else format(row['bits_per_byte'], '.4f'):>11}"
        line += f"{format(row['tokens'], ',') if 'tokens' in row else '':>13}"
        lines.append((line + (f"{row['unigram_loss']:>14.4f}" if "unigram_loss" in row else "")).rstrip())
    return "\n".join(lines)


def _short(perplexity: float) -> str:
    return f"{perplexity:,.2f}" if perplexity < 1e8 else f"{perplexity:.3g}"
