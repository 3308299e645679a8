"""Fixtures of the whole suite: the real corpora where they are, and a tiny tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch: the models are tiny, and workers of pytest-xdist share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

# How long an example takes is a matter of the machine: no test fails for it.
hypothesis.settings.register_profile("ekiden", deadline=None)
hypothesis.settings.load_profile("ekiden")

TEXT = [
    "The river runs past the old mill and turns the wheel all day, even when nobody grinds flour any more.",
    "De rivier stroomt langs de oude molen en draait het rad de hele dag, ook als niemand meer maalt.",
    "नदी पुरानी चक्की के पास से बहती है और दिन भर पहिया घुमाती है।",
    "न्हंय पोरन्या चक्की कुशीक व्हांवता आनी दीसभर चाक घुंवडायता.",
]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def corpora() -> Path:
    """Return the folder of the real corpora; a test that needs it is skipped where it is not there."""
    default = Path(__file__).parents[2] / "shared" / "corpora"
    root = Path(os.environ.get("EKIDEN_CORPORA", default))
    if not (root / "konkani").is_dir():
        pytest.skip(f"no corpora in {root}; set EKIDEN_CORPORA")
    return root


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus of four small languages, 60 documents each."""
    import json

    root = tmp_path_factory.mktemp("corpus")
    for name, text in zip(("english", "dutch", "hindi", "konkani"), TEXT):
        words = text.split()
        (root / name).mkdir()
        with (root / name / "text.jsonl").open("w", encoding="utf-8") as file:
            for i in range(60):
                turned = " ".join(words[i % len(words) :] + words[: i % len(words)])
                file.write(json.dumps({"text": f"{i} {turned}\n{turned}"}, ensure_ascii=False) + "\n")
    return root


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def tiny_tokenizer_path(
    request: pytest.FixtureRequest, language_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a SentencePiece model of 500 pieces, BPE and unigram in turn."""
    from ekiden.tokenizer.train import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / f"{request.param}.model"
    train_tokenizer([str(language_folder)], str(path), vocab_size=430, model_type=request.param)
    return path


@pytest.fixture(scope="session")
def rensa() -> None:
    """Skip where the package for near duplicates is missing."""
    pytest.importorskip("rensa", reason="needs rensa: pip install 'ekiden[dedupe]'")
