"""`ekiden generate`: prompts from anywhere, one model or several, to the terminal, a file, or as JSON lines.

Models are loaded one after another, so that comparing ten takes the memory of one; what they wrote is shown prompt by
prompt. A single prompt of a single model is shown as it grows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ekiden.errors import UsageError
from ekiden.export.load import LoadedModel, check_models, load_model
from ekiden.export.printed import check_output, emit
from ekiden.generation.batch import BATCH_SIZE, Continuation, continue_prompts, devices_for
from ekiden.generation.benchmark import (
    BATCH_SIZES,
    NEW_TOKENS,
    PROMPT_LENGTHS,
    benchmark_generation,
    format_benchmark,
)
from ekiden.generation.interactive import ask_on_terminal, converse, line_history
from ekiden.generation.prompts import collect_prompts, piped_prompt
from ekiden.generation.sampling import Sampling
from ekiden.generation.streaming import stream
from ekiden.progress import say


@dataclass(frozen=True)
class Written:
    """What one model wrote after all prompts. name: as the user gave it."""

    name: str
    step: int | None
    continuations: list[Continuation]


def run_generate(
    models: str | list[str],
    prompts: list[str],
    prompt_files: list[str] | None = None,
    interactive: bool = False,
    device: str = "auto",
    batch_size: int = BATCH_SIZE,
    output: str | None = None,
    as_json: bool = False,
    **settings: Any,
) -> None:
    """Write continuations of prompts, or converse on the terminal: `ekiden generate`.

    Args:
        models: MODELs, whose texts are shown side by side.
        prompts: texts; - is standard input. prompt_files: files of them.
        device: auto shares batches out over all GPUs.
        output: a file that takes what would be printed. as_json: as JSON lines.
        settings: of `Sampling`; None: its default.

    Raises:
        UserError: a model, a file or a prompt cannot be used. UsageError: a setting out of range, or no prompts.
    """
    models = [models] if isinstance(models, str) else models
    sampling = Sampling(**{name: value for name, value in settings.items() if value is not None})
    if batch_size < 1:
        raise UsageError(f"--batch-size must be 1 or more, not {batch_size}")
    if interactive and (len(models) > 1 or as_json or output):
        raise UsageError(
            "--interactive talks with one model on the terminal; leave out --json, --output and the others"
        )
    found = collect_prompts(prompts, prompt_files or [])
    if not found and not interactive:
        found = piped_prompt()
    if not found and not interactive:
        raise UsageError(
            "there is nothing to continue; give --prompt TEXT, --prompt-file FILE or --interactive"
        )
    check_models(models)
    if interactive:
        loaded = _load(models[0], device)
        with line_history():
            converse(loaded.model, loaded.tokenizer, sampling, ask_on_terminal, _write, found)
    elif len(models) == len(found) == 1 and not as_json and not output:
        loaded = _load(models[0], device)
        _write(found[0])
        for piece in stream(loaded.model, loaded.tokenizer, found[0], sampling):
            _write(piece)
        _write("\n")
    else:
        check_output(output)
        written = [_continue_all(name, found, sampling, batch_size, device) for name in models]
        emit(json_lines(found, written, sampling.seed) if as_json else side_by_side(found, written), output)


def run_benchmark(
    models: list[str],
    batch_sizes: str | None = None,
    prompt_lengths: str | None = None,
    unused: Sequence[str] = (),
    device: str = "auto",
    output: str | None = None,
    as_json: bool = False,
    **settings: Any,
) -> None:
    """Print the table of `benchmark_generation` for every model, and last everything as one JSON object.

    Args:
        batch_sizes: separated by commas; None: the usual ones. prompt_lengths: the same, in tokens.
        unused: flags that were given and mean nothing here. as_json: the JSON object alone.

    Raises:
        UserError: a model cannot be used. UsageError: a setting out of range, or an unused flag.
    """
    if unused:
        raise UsageError(f"--benchmark reads random tokens; leave out {' and '.join(unused)}")
    given = {name: value for name, value in settings.items() if value is not None}
    sampling = Sampling(**{"max_new_tokens": NEW_TOKENS, **given})
    sizes = _numbers("--benchmark-batch-sizes", batch_sizes) or BATCH_SIZES
    lengths = _numbers("--benchmark-prompt-lengths", prompt_lengths) or PROMPT_LENGTHS
    check_models(models)
    check_output(output)
    results = [benchmark_generation(_load(name, device), sampling, sizes, lengths) for name in models]
    tables = [] if as_json else [format_benchmark(result) + "\n" for result in results]
    emit("\n".join([*tables, json.dumps({"benchmark": results}) + "\n"]), output)


def _numbers(flag: str, text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"{flag} {text} is not a list of whole numbers; give some, as {flag} 1,8") from None


def _load(name: str, device: str) -> LoadedModel:
    loaded = load_model(name, device)
    say(f"{loaded.path}" + (f" (step {loaded.step})" if loaded.step else ""))
    return loaded


def _continue_all(name: str, prompts: list[str], sampling: Sampling, batch_size: int, device: str) -> Written:
    """Load a model, let it continue all prompts, and let it go."""
    devices = devices_for(device, len(prompts), batch_size)
    # Where every device has a process that loads the model, this one needs the tokenizer and no GPU memory.
    loaded = _load(name, device if len(devices) == 1 else "cpu")
    return Written(name, loaded.step, continue_prompts(loaded, prompts, sampling, batch_size, devices))


def json_lines(prompts: list[str], written: list[Written], seed: int) -> str:
    """Return a line for each prompt and model: {"model", "step", "prompt", "text", "tokens", "seed"}.

    text: without the prompt. tokens: new ones.
    """
    return "".join(
        json.dumps(
            {
                "model": one.name,
                "step": one.step,
                "prompt": prompt,
                "text": one.continuations[index].text,
                "tokens": one.continuations[index].tokens,
                "seed": seed,
            },
            ensure_ascii=False,
        )
        + "\n"
        for index, prompt in enumerate(prompts)
        for one in written
    )


def side_by_side(prompts: list[str], written: list[Written]) -> str:
    """Return the texts prompt by prompt; where there are several models, each under its name."""
    if len(written) == 1:
        results = written[0].continuations
        return "".join(f"{prompt}{result.text}\n\n" for prompt, result in zip(prompts, results))
    parts = []
    for index, prompt in enumerate(prompts):
        parts.append(f"=== {prompt}\n")
        for one in written:
            step = f" (step {one.step})" if one.step else ""
            parts.append(f"--- {one.name}{step}\n{one.continuations[index].text}\n")
        parts.append("\n")
    return "".join(parts)


def _write(text: str) -> None:
    print(text, end="", flush=True)
