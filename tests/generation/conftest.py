"""A tokenizer and two exported models for the tests of `ekiden generate`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_models import small_model, small_tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the exported models gpt2/ and gemma3/."""
    from ekiden.export.huggingface import export_huggingface

    root = tmp_path_factory.mktemp("models")
    tokenizer = small_tokenizer(root)
    for name, preset in (("gpt2", "gpt2-10m"), ("gemma3", "gemma3-tiny")):
        export_huggingface(small_model(preset, tokenizer), tokenizer, root / name)
    return root
