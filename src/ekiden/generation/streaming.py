"""One text as it grows: prompt to ids, ids to the next tokens, tokens to whole characters.

Takes a model and its tokenizer (`export.load`). The loop is our own, over transformers' key/value cache, because each
prompt draws from a random stream of its own (`sampling`). `batch` runs it for many prompts, `interactive` for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ekiden.errors import UserError
from ekiden.generation.sampling import Sampling, choose, prompt_generator
from ekiden.progress import say
from ekiden.tokenizer.load import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
DECODE_CONTEXT = 16
"""Ids of the prompt decoded with the new ones: a piece's leading space shows only after another piece."""
DECODE_WINDOW = 64
"""Ids decoded anew for a new one; without a bound a text of n tokens costs n^2."""
CHARACTER_BYTES = 4
"""Bytes of the longest character in UTF-8, each a token of its own at worst."""


def stream(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces as it grows; a character comes whole or not yet."""
    row = prompt_ids(model, tokenizer, prompt)
    generators = [prompt_generator(prompt, 0, sampling.seed)]
    text = TextStream(tokenizer, row)
    for (token,) in next_tokens(model, [row], sampling, generators, tokenizer.vocab_size, tokenizer.eos_id):
        if token is None:
            break
        if piece := text.push(token):
            yield piece
    if rest := text.finish():
        yield rest


def context_of(model: PreTrainedModel) -> int:
    """Return the most tokens the model reads at once."""
    return int(model.config.max_position_embeddings)


def prompt_ids(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids the model reads for `prompt`: BOS where the tokenizer has one, then the text.

    A prompt longer than the model's context is cut from the left, which is said.

    Raises:
        UserError: nothing to begin with.
    """
    ids, context = whole_prompt_ids(tokenizer, prompt), context_of(model)
    if len(ids) > context:
        say(f"prompt of {len(ids)} tokens: the model reads its last {context}, the length of its context")
    return ids[-context:]


def whole_prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of `prompt`, however long.

    Raises:
        UserError: nothing to begin with.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [*begin, *tokenizer.encode(prompt)]
    if ids:
        return ids
    # After the end of a document another one begins, as in training.
    if tokenizer.eos_id is None:
        raise UserError(
            "an empty --prompt needs a tokenizer with BOS or EOS, which this one lacks; give some text"
        )
    return [tokenizer.eos_id]


class TextStream:
    """The text that new ids add after a prompt, given out in whole characters (code points).

    Bytes of a character may be tokens of their own; until its last one they decode to U+FFFD and are held back.
    What was given out is never taken back. `push` costs the decoding of at most about DECODE_WINDOW ids.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = self._end_of(prompt)
        self.given = tokenizer.decode(self.ids)
        """What `ids` up to the last boundary decode to."""
        self.boundaries = [len(self.ids)]
        """Positions in `ids` where all text before had been given out."""

    def _end_of(self, prompt: list[int]) -> list[int]:
        """Return the last ids of a prompt, beginning with a whole character."""
        for length in range(DECODE_CONTEXT, DECODE_CONTEXT + CHARACTER_BYTES):
            if not self.tokenizer.decode(prompt[-length:]).startswith(REPLACEMENT):
                return prompt[-length:]
        return prompt[-DECODE_CONTEXT:]

    def push(self, token: int) -> str:
        """Return the text that `token` completes, often nothing."""
        self.ids.append(token)
        whole = self.tokenizer.decode(self.ids)
        pending = self.ids[self.boundaries[-1] :]
        if not whole.startswith(self.given) and len(pending) > CHARACTER_BYTES:
            # Bytes that make no character changed how those before them decode (the tokenizers library turns a
            # whole run of bytes into U+FFFD): the text goes on without what stands before.
            self.ids, self.given, self.boundaries = pending, "", [0]
            whole = self.tokenizer.decode(pending)
        if whole.endswith(REPLACEMENT) or not whole.startswith(self.given):
            return ""
        piece = whole[len(self.given) :]
        self.given = whole
        self.boundaries.append(len(self.ids))
        self._shorten()
        return piece

    def finish(self) -> str:
        """Return what was held back: bytes that never became a character are shown as U+FFFD."""
        whole = self.tokenizer.decode(self.ids)
        if whole.startswith(self.given):
            return whole[len(self.given) :]
        return self.tokenizer.decode(self.ids[self.boundaries[-1] :])

    def _shorten(self) -> None:
        """Forget ids at a boundary, so that a character's bytes stay together."""
        if len(self.ids) <= DECODE_WINDOW:
            return
        cut = max((b for b in self.boundaries if b <= len(self.ids) - DECODE_CONTEXT), default=0)
        self.ids = self.ids[cut:]
        self.boundaries = [b - cut for b in self.boundaries if b >= cut]
        self.given = self.tokenizer.decode(self.ids)


def continuation(tokenizer: Tokenizer, prompt: list[int], new_ids: list[int]) -> str:
    """Return the text that `new_ids` add after `prompt`, the same that a stream gives out in pieces."""
    text = TextStream(tokenizer, prompt)
    return "".join([text.push(token) for token in new_ids]) + text.finish()


@torch.no_grad()
def next_tokens(
    model: PreTrainedModel,
    rows: list[list[int]],
    sampling: Sampling,
    generators: list[torch.Generator],
    vocab_size: int,
    eos_id: int | None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every row until all have ended; None for a row that has.

    A row ends before EOS or at `max_new_tokens`. Where a row is full (GPT-2 has no positions beyond its context), it
    goes on with its newer half, read anew.

    Args:
        rows: ids of each prompt.
        vocab_size: pieces of the tokenizer; a model may have more rows than that, which mean nothing.
    """
    context = context_of(model)
    views = [row[-context:] for row in rows]
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
    for index, row in enumerate(rows):
        seen[index, row] = True
    seen = seen.to(model.device)
    ended = [False] * len(rows)
    cache: DynamicCache | None = None
    for _ in range(sampling.max_new_tokens):
        if cache is None:
            cache, (inputs, mask) = DynamicCache(config=model.config), pad_left(views, model.device)
        logits = _forward(model, inputs, mask, cache, context)[:, :vocab_size]
        tokens = choose(logits, seen, sampling, generators)
        ended = [before or token == eos_id for before, token in zip(ended, tokens)]
        if all(ended):
            return
        yield [None if end else token for end, token in zip(ended, tokens)]
        for index, token in enumerate(tokens):
            views[index].append(token)
            if len(views[index]) > context:
                views[index] = views[index][-(context // 2) :]
                cache = None
        inputs = torch.tensor([[token] for token in tokens], device=model.device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        seen.scatter_(1, inputs, True)


def pad_left(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (1: a token), [rows, longest] each, with the padding on the left."""
    longest = max(len(row) for row in rows)
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _forward(
    model: PreTrainedModel, inputs: torch.Tensor, mask: torch.Tensor, cache: DynamicCache, context: int
) -> torch.Tensor:
    """Return the fp32 logits [b, V] after the last of `inputs` [b, n], extending `cache`; `mask` is [b, all so far]."""
    extra: dict[str, Any] = {}
    if not bool(mask.all()):
        positions = (mask.cumsum(1) - 1).clamp(0, context - 1)
        extra = {"attention_mask": mask, "position_ids": positions[:, -inputs.shape[1] :]}
    # A compiled body would be compiled again for every length of the cache.
    with _evaluating(model), torch.compiler.set_stance("force_eager"):
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
    logits = output.logits[:, -1].float()
    if not torch.isfinite(logits).all():
        raise UserError(
            "the model's output is not finite: its weights are damaged; generate from another checkpoint"
        )
    return logits


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode for a while: the trainer generates samples between its steps."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
