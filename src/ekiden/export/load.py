"""A trained model, ready to use, from anything that a user may call a model.

A run directory (its best model, else its newest checkpoint, else the final model), a checkpoint, or a Hugging Face
folder. Evaluation, generation and exports take what they work on from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ekiden.checkpoint.manifest import NAME, Damaged, verify_folder
from ekiden.errors import UserError
from ekiden.progress import say
from ekiden.tokenizer.load import Tokenizer, load_tokenizer


@dataclass
class LoadedModel:
    """A model in evaluation mode with its tokenizer; `path` is the folder it came from."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    path: Path


def load_model(path: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """Load the model in `path`, fp32, onto `device`.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    folder = find_model(Path(path))
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} cannot be loaded as a model ({str(error).splitlines()[0][:160]})") from None
    return LoadedModel(model.to(device).eval(), load_tokenizer(folder), folder)


def find_model(path: Path) -> Path:
    """Return the folder of the model that `path` stands for: every file with a hash is verified.

    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        raise UserError(f"model {path} does not exist; give a run directory, a checkpoint or a Hugging Face folder")
    if (path / "config.json").is_file():
        problem = damage_of(path)
        if problem:
            raise UserError(f"model {path} is damaged: {problem}; choose another checkpoint")
        return path
    checkpoints = sorted((path / "checkpoints").glob("step-*"), reverse=True)
    for candidate in (path / "best", *checkpoints, path / "final_model"):
        if not (candidate / "config.json").is_file():
            continue
        problem = damage_of(candidate)
        if problem is None:
            return candidate
        say(f"{candidate} is damaged and was passed over: {problem}")
    raise UserError(
        f"model {path} holds no best/, checkpoints/ or final_model/ and no config.json; give the --output-dir of `ekiden train`"
    )


def damage_of(folder: Path) -> str | None:
    """Return what is wrong with a folder that has a manifest; None where nothing is, or where it has none."""
    if not (folder / NAME).exists():
        return None
    try:
        verify_folder(folder)
    except Damaged as damage:
        return str(damage)
    return None
