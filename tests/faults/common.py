"""What the fault drivers share: small runs, a checkpoint's content as one hash, rows of the table.

`syscalls` and `power_cut` take from here what they save and how they recognise it again. A content hash is of the
files' bytes as they are read back, not of what a manifest claims.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ekiden.checkpoint.folder import Checkpoint
from ekiden.checkpoint.store import CheckpointStore, CheckpointWriter
from ekiden.config import TrainConfig, build_config
from ekiden.tokenizer.train import train_tokenizer
from ekiden.tokens.build import preprocess

Row = dict[str, Any]

SENTENCES = (
    "The ferry leaves when the tide allows it, and the people on the quay have learned to wait.",
    "De pont vertrekt wanneer het tij het toelaat, en de mensen op de kade hebben leren wachten.",
)


@dataclass
class Tally:
    """One row of the campaign's table, as it is counted.

    resumed: after the fault the store opened, found a checkpoint without help and took the next save.
    bit_identical: what it found has the bytes that were saved. data_lost: an acknowledged checkpoint was not there.
    """

    fault: str
    tries: int = 0
    resumed: int = 0
    bit_identical: int = 0
    data_lost: int = 0

    @property
    def whole(self) -> bool:
        """Whether there were tries and nothing went wrong in any."""
        return 0 < self.tries == self.resumed == self.bit_identical and self.data_lost == 0


def report(campaign: str, rows: list[Row], passed: bool, **facts: Any) -> int:
    """Print the rows as a table and, last, everything as one JSON object; return the exit status."""
    columns = [name for name in rows[0] if name != "fault"] if rows else []
    print(f"{'fault':<58}" + "".join(f"{name:>15}" for name in columns))
    for row in rows:
        print(f"{row['fault']:<58}" + "".join(f"{row[name]!s:>15}" for name in columns))
    print(json.dumps({"campaign": campaign, **facts, "rows": rows, "passed": passed}))
    return 0 if passed else 1


def work_folder() -> str | None:
    """Return a parent for folders that many trials copy: in memory where there is such a place, else the default."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# -- what is saved ----------------------------------------------------------------------------------------------------


def writer_of(step: int, kilobytes: int = 4) -> Callable[[CheckpointWriter], None]:
    """Return what writes a checkpoint of `step`: two files of tensors of so many kB each, and the counters."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(kilobytes * 256, generator=generator)
    moments = {"exp_avg/weight": weight.square(), "step/weight": torch.tensor(float(step))}

    def write(writer: CheckpointWriter) -> None:
        writer.tensors("model.safetensors", {"weight": weight}, {"format": "pt"})
        writer.tensors("optimizer.safetensors", moments)
        writer.json("trainer_state.json", {"step": step})

    return write


def save(folder: Path, step: int, keep: int = 2, kilobytes: int = 4) -> Checkpoint:
    """Save the checkpoint of `step` as a process would that just started."""
    facts = {"tokens": 1000 * step}
    return CheckpointStore(folder, keep=keep).save(step, writer_of(step, kilobytes), facts)


def content(folder: Path) -> str:
    """Return one hash over the names and bytes of all files of a checkpoint but its manifest, read now."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != "MANIFEST.json":
            data = path.read_bytes()
            digest.update(f"{path.name} {len(data)} ".encode() + data)
    return digest.hexdigest()


# -- small runs -------------------------------------------------------------------------------------------------------


def small_shards(folder: Path) -> Path:
    """Write token shards of two languages with a tokenizer of 400 pieces; return their folder."""
    for name, text in zip(("english", "dutch"), SENTENCES, strict=True):
        path = folder / "corpus" / name / "text.jsonl"
        path.parent.mkdir(parents=True)
        words = text.split()
        turned = (" ".join(words[i % len(words) :] + words[: i % len(words)]) for i in range(200))
        path.write_text("".join(json.dumps({"text": f"{i} {line}"}) + "\n" for i, line in enumerate(turned)))
    corpus, tokenizer = [str(folder / "corpus")], str(folder / "tokenizer.model")
    train_tokenizer(corpus, tokenizer, vocab_size=400, model_type="bpe")
    with ThreadPoolExecutor(1) as executor:  # a worker process would import torch a second time
        preprocess(corpus, tokenizer, str(folder / "shards"), test_split=0.05, executor=executor)
    return folder / "shards"


def small_config(preset: str, shards: Path, run: Path, steps: int, **more: Any) -> TrainConfig:
    """Return settings of a run of `preset`, cut down to two layers, that saves at every step and keeps two."""
    heads = 2 if preset.startswith("gpt2") else 1
    settings = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": heads,
        "head_dim": 16,
        "intermediate_size": 64,
        "sliding_window": 16,
        "max_length": 32,
        "batch_size": 4,
        "dataset_path": str(shards),
        "output_dir": str(run),
        "max_steps": steps,
        "log_steps": 1,
        "eval_steps": 1000,
        "sample_steps": 0,
        "save_steps": 1,
        "max_checkpoints": 2,
        "warmup_steps": 2,
        "num_threads": 1,
    }
    return build_config(preset, **{**settings, **more})
