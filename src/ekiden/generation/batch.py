"""Many prompts: batches of similar length, shared out over the GPUs there are.

Takes prompts (`prompts`, or a Python list), gives one `Continuation` each, in their order. Batches are made before they
are shared out, so the number of devices does not change what is computed together. With several devices each has a
process of its own that loads the model by its path: Python's part of a decoding step would queue up in one process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ekiden.errors import UserError
from ekiden.export.load import LoadedModel, load_model
from ekiden.generation.sampling import Sampling, occurrences, prompt_generator
from ekiden.generation.streaming import context_of, continuation, next_tokens, whole_prompt_ids
from ekiden.progress import Progress, say
from ekiden.tokenizer.load import Tokenizer

BATCH_SIZE = 16


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt: the text without the prompt, and its length in tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Row:
    """A prompt as the model reads it. occurrence: how often the same prompt stood before it in the list."""

    prompt: str
    occurrence: int
    ids: list[int]


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    repetition_penalty: float = 1.1,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    min_p: float = 0.0,
) -> list[str]:
    """Return the continuation of each prompt, without the prompt.

    Each prompt has its own random stream, so its text does not depend on the others; a prompt that occurs twice gets
    two texts. `batch_size` prompts are computed together, which changes only the last bits of the logits; where that
    many do not fit into memory, half as many.

    Raises:
        UsageError: a setting out of range.
        UserError: an empty prompt and a tokenizer without BOS and EOS; one prompt alone does not fit into memory.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    rows = prompt_rows(tokenizer, prompts, context_of(model))
    texts: list[str] = [""] * len(rows)
    for batch in plan_batches([len(row.ids) for row in rows], batch_size):
        made = continue_batch(model, tokenizer, [rows[index] for index in batch], sampling)
        for index, result in zip(batch, made):
            texts[index] = result.text
    return texts


def prompt_rows(tokenizer: Tokenizer, prompts: Sequence[str], context: int) -> list[Row]:
    """Return the prompts as the model reads them; how many are longer than its context is said once.

    Raises:
        UserError: nothing to begin with.
    """
    whole = [whole_prompt_ids(tokenizer, prompt) for prompt in prompts]
    longest = max((len(ids) for ids in whole), default=0)
    if longest > context:
        count = sum(len(ids) > context for ids in whole)
        say(
            f"{count} of {len(whole)} prompts longer than the model's context (up to {longest} tokens): the model reads "
            f"their last {context}"
        )
    return [
        Row(prompt, number, ids[-context:])
        for prompt, number, ids in zip(prompts, occurrences(prompts), whole)
    ]


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the positions of prompts computed together: by length, so that a batch holds little padding."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def share_batches(costs: Sequence[int], devices: int) -> list[list[int]]:
    """Return for each device the positions of its batches: the dearest first, to whoever has least.

    No device has more than the mean and one batch (Graham 1969). A device may get none.
    """
    shares: list[list[int]] = [[] for _ in range(devices)]
    loads = [0] * devices
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        device = loads.index(min(loads))
        shares[device].append(index)
        loads[device] += costs[index]
    return shares


def continue_batch(
    model: PreTrainedModel, tokenizer: Tokenizer, rows: Sequence[Row], sampling: Sampling
) -> list[Continuation]:
    """Return the continuations of `rows`, computed together, or in halves where memory does not suffice.

    Raises:
        UserError: one row alone does not fit into memory.
    """
    try:
        return _continue_together(model, tokenizer, rows, sampling)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if len(rows) == 1:
            raise UserError(
                f"one prompt of {len(rows[0].ids)} tokens and --max-new-tokens {sampling.max_new_tokens} do not fit "
                "into memory; give smaller ones, or --device cpu"
            ) from None
    half = (len(rows) + 1) // 2
    say(f"{len(rows)} prompts at a time do not fit into memory; going on with {half}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [
        result
        for part in (rows[:half], rows[half:])
        for result in continue_batch(model, tokenizer, part, sampling)
    ]


def out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator raised `error`; the CPU's raises a plain RuntimeError."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _continue_together(
    model: PreTrainedModel, tokenizer: Tokenizer, rows: Sequence[Row], sampling: Sampling
) -> list[Continuation]:
    generators = [prompt_generator(row.prompt, row.occurrence, sampling.seed) for row in rows]
    new_ids: list[list[int]] = [[] for _ in rows]
    ids = [row.ids for row in rows]
    for tokens in next_tokens(model, ids, sampling, generators, tokenizer.vocab_size, tokenizer.eos_id):
        for made, token in zip(new_ids, tokens):
            if token is not None:
                made.append(token)
    return [
        Continuation(continuation(tokenizer, row.ids, made), len(made)) for row, made in zip(rows, new_ids)
    ]


# -- over several devices -------------------------------------------------------------------------------------


def devices_for(requested: str, prompts: int, batch_size: int) -> list[str]:
    """Return the devices to generate on: for auto every GPU of this machine that a batch is left for."""
    count = torch.cuda.device_count() if requested == "auto" and torch.cuda.is_available() else 1
    count = min(count, -(-prompts // batch_size))
    return [f"cuda:{number}" for number in range(count)] if count > 1 else [requested]


def continue_prompts(
    loaded: LoadedModel,
    prompts: Sequence[str],
    sampling: Sampling,
    batch_size: int = BATCH_SIZE,
    devices: Sequence[str] = (),
) -> list[Continuation]:
    """Return the continuation of every prompt, in order, showing progress.

    Args:
        devices: where there are several and more than one batch, each takes its share in a process of its own;
            otherwise `loaded` does all.

    Raises:
        UserError: as `generate`, or a process ended.
    """
    rows = prompt_rows(loaded.tokenizer, prompts, context_of(loaded.model))
    batches = plan_batches([len(row.ids) for row in rows], batch_size)
    work = [[rows[index] for index in batch] for batch in batches]
    results: list[Continuation] = [Continuation("", 0)] * len(rows)
    with Progress(len(rows), "prompts", "generating") as progress:
        for number, made in _run(loaded, work, sampling, devices):
            for index, result in zip(batches[number], made):
                results[index] = result
            progress.update(len(made))
    return results


def _run(
    loaded: LoadedModel, work: list[list[Row]], sampling: Sampling, devices: Sequence[str]
) -> Iterator[tuple[int, list[Continuation]]]:
    """Yield (number of the batch, its continuations) as they are finished."""
    count = min(len(devices), len(work))
    if count < 2:
        for number, rows in enumerate(work):
            yield number, continue_batch(loaded.model, loaded.tokenizer, rows, sampling)
        return
    costs = [sum(len(row.ids) + sampling.max_new_tokens for row in rows) for rows in work]
    shares = share_batches(costs, count)
    say(f"{len(work)} batches over {', '.join(devices[:count])}")
    # spawn: a forked child cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        futures = {
            pool.submit(_continue_share, str(loaded.path), device, [work[i] for i in share], sampling): share
            for device, share in zip(devices, shares)
        }
        try:
            for future in as_completed(futures):
                yield from zip(futures[future], future.result())
        except BrokenProcessPool:
            raise UserError(
                "a process that generated on one of the devices ended (memory, perhaps); give --device cuda:0, or a "
                "smaller --batch-size"
            ) from None


def _continue_share(
    path: str, device: str, work: list[list[Row]], sampling: Sampling
) -> list[list[Continuation]]:
    """Load the model on `device` and continue batches of rows: the work of one process."""
    loaded = load_model(path, device)
    return [continue_batch(loaded.model, loaded.tokenizer, rows, sampling) for rows in work]
