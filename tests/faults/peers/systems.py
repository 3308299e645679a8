"""What every system under comparison has in common, and the model and data that they train on.

The peers train a GPT-2 of 1.3 million parameters (weights and Adam's moments: 16 MB) on fixed token ids; Ekiden trains
the same sizes from token shards of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch

from peers.trial import Session

VOCAB, WIDTH, LAYERS, HEADS, LENGTH, BATCH, KEEP = 400, 160, 4, 4, 32, 4, 2
SAMPLES = 4096


class System(ABC):
    """A training command and its files.

    Attributes:
        name: for `--only`. title: for the tables. settings: what was chosen among its settings.
        environment: variables of its process.
    """

    name: str
    title: str
    settings: str

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}

    @abstractmethod
    def load_libraries(self) -> None:
        """Import what the command needs, before it is forked."""

    def versions(self) -> dict[str, str]:
        """Return the versions of its own libraries."""
        return {}

    @abstractmethod
    def train(self, session: Session) -> None:
        """Resume by its own rules and train; the one command, the same every time."""

    @abstractmethod
    def newest_files(self, run: Path) -> dict[str, Path]:
        """Return the files that its newest state consists of, by what is in them: weights, optimizer, or both."""

    @abstractmethod
    def repair(self, run: Path) -> None:
        """Do the least that a person has to do when the command refuses: take the newest state away."""


def build_model() -> torch.nn.Module:
    """Return the model of the peers, the same every time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=LENGTH,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def samples() -> torch.Tensor:
    """Return the training data of the peers: token ids [SAMPLES, LENGTH]."""
    return torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


def newest_folder(run: Path, pattern: str, marker: str = "") -> Path | None:
    """Return the folder with the highest number after its last dash, among those that hold `marker`."""
    found = [path for path in run.glob(pattern) if path.is_dir() and (not marker or (path / marker).exists())]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
