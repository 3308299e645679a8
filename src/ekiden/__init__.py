"""Ekiden pretrains language models from scratch, in any language, on machines that will be taken away.

The public names are imported on first use, so that `ekiden --help` does not wait seconds for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "TrainConfig": "ekiden.config",
    "UserError": "ekiden.errors",
    "train": "ekiden.training.loop",
    "preprocess": "ekiden.tokens.build",
    "train_tokenizer": "ekiden.tokenizer.train",
    "load_tokenizer": "ekiden.tokenizer.load",
    "load_model": "ekiden.export.load",
    "load_json_checkpoint": "ekiden.checkpoint.json_format",
    "evaluate": "ekiden.evaluation.loss",
    "generate": "ekiden.generation",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ekiden' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
