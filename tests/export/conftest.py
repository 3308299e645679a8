"""Tokenizers and models for the tests of exports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ekiden.tokenizer.load import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_models import small_tokenizer


@pytest.fixture(scope="session", params=["unigram", "bpe"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer of each kind."""
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a unigram tokenizer."""
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
