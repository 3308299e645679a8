"""Any MODEL, ready to use: a run directory, a checkpoint, or a Hugging Face folder.

`evaluate`, `generate` and `export` begin here. Weights come from safetensors only: nothing is unpickled, and no
code that lies beside a model is run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hub_logging

from ekiden.checkpoint.manifest import NAME as MANIFEST
from ekiden.checkpoint.manifest import Damaged, read_manifest, verify_folder
from ekiden.errors import UserError, nearest
from ekiden.modeling.device import select_device
from ekiden.progress import say
from ekiden.tokenizer.load import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, the folder they came from, and its training step where known."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    path: Path
    step: int | None


def load_model(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Return the model at `path` on `device`, its weights in `dtype`.

    Args:
        path: a run directory (its best/, else its newest good checkpoint, else its final_model/), a checkpoint,
            or a Hugging Face folder.
        device: auto, cpu, cuda or cuda:N.
        tokenizer: where the folder holds none, a `.model` file or a tokenizer folder.

    Raises:
        UserError: nothing usable is there; the sentence says what was looked for.
    """
    folder = find_model(Path(path))
    target = select_device(str(device))
    model = _load_weights(folder, dtype)
    loaded = load_tokenizer(tokenizer or folder)
    if loaded.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {loaded.vocab_size} pieces and the model {model.config.vocab_size}; give "
            "the tokenizer that the model was trained with"
        )
    model.to(target)  # type: ignore[arg-type]
    return LoadedModel(model.eval(), loaded, folder, _step(folder))


def check_models(models: Sequence[str]) -> None:
    """Refuse a MODEL that is not there before hours are spent on the others.

    Raises:
        UserError: with the nearest name in the same folder.
    """
    for name in models:
        path = Path(name)
        if path.is_dir():
            continue
        siblings = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
        raise UserError(
            f"{name} {'is a file' if path.is_file() else 'does not exist'}{nearest(path.name, siblings)}; give a run "
            "directory, a checkpoint or a Hugging Face folder"
        )


def find_model(path: Path) -> Path:
    """Return the folder with `config.json` and weights that `path` means.

    Raises:
        UserError: there is none.
    """
    check_models([str(path)])
    if (path / "config.json").is_file():
        if damage := _damage(path):
            raise UserError(f"{path} is damaged ({damage}); give another checkpoint, or a copy of this one")
        return path
    for folder in _candidates(path):
        damage = _damage(folder)
        if damage is None:
            return folder
        say(f"passed over {folder.name}: {damage}")
    raise UserError(
        f"{path} holds no model (looked for config.json, then best/, checkpoints/step-N/ and final_model/ of a run); "
        "give a run directory, a checkpoint or a Hugging Face folder"
    )


def _candidates(run: Path) -> Iterator[Path]:
    """Yield a run's models in the order of preference, changing nothing: a trainer may be at work there."""
    steps = []
    for folder in (run / "checkpoints").glob("step-*"):
        try:
            steps.append((read_manifest(folder).step, folder))
        except Damaged as damage:
            say(f"passed over {folder.name}: {damage}")
    newest_first = [folder for _step, folder in sorted(steps, reverse=True)]
    for folder in (run / "best", *newest_first, run / "final_model"):
        if (folder / "config.json").is_file():
            yield folder


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a folder that Ekiden wrote, by its manifest, or None; others have no manifest."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        verify_folder(folder)
    except Damaged as damage:
        return str(damage)
    return None


def _load_weights(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with _quiet():
            result: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{folder} cannot be loaded ({reason}); it must hold config.json and model.safetensors of a causal "
            "language model"
        ) from None
    model, report = result
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # transformers only warns, and leaves what is missing at random values.
        if report.get(kind):
            name = sorted(str(key) for key in report[kind])[0]
            raise UserError(
                f"{folder}: its weights are not its config.json's ({kind.replace('_', ' ')}: {name})"
            )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' load report and bar: what it says here becomes an error's sentence."""
    logger = logging.getLogger("transformers")
    level, bar = logger.level, hub_logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    hub_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            hub_logging.enable_progress_bar()


def _step(folder: Path) -> int | None:
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return read_manifest(folder).step or None
    except Damaged:
        return None
