"""The other programs of `benchmarks/preprocess.py`, in an environment of their own:

    python3 -m venv /tmp/peers
    /tmp/peers/bin/pip install torch==2.13.0 transformers 'datasets==5.2.0' 'datatrove[processing,io]==0.10.1' spacy

`preprocess_peers.py datasets|datatrove|ids CORPUS TOKENIZER OUTPUT WORKERS` does what the name says; Ekiden is not imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

CONTEXT = 1024


def with_datasets(corpus: Path, tokenizer: str, output: Path, workers: int) -> None:
    """Tokenize by `map`, group to CONTEXT tokens by `map`, `save_to_disk`: the usual recipe of training scripts."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    encoder = AutoTokenizer.from_pretrained(tokenizer)
    dataset = load_dataset("json", data_files=[str(file) for file in files_of(corpus)], split="train")

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": encoder(batch["text"], return_attention_mask=False)["input_ids"]}

    def group(batch: dict[str, Any]) -> dict[str, Any]:
        joined = list(chain.from_iterable(batch["input_ids"]))
        length = len(joined) // CONTEXT * CONTEXT
        blocks = [joined[i : i + CONTEXT] for i in range(0, length, CONTEXT)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    tokenized = dataset.map(tokenize, batched=True, num_proc=workers, remove_columns=dataset.column_names)
    tokenized.map(group, batched=True, num_proc=workers).save_to_disk(str(output))


def with_datatrove(corpus: Path, tokenizer: str, output: Path, workers: int) -> None:
    """Read and tokenize by datatrove's own local executor, one task a file."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(corpus), recursive=True, glob_pattern="**/*.jsonl"),
            DocumentTokenizer(
                str(output),
                tokenizer_name_or_path=str(Path(tokenizer) / "tokenizer.json"),
                eos_token=None,
                shuffle_documents=False,
            ),
        ],
        tasks=workers,
        workers=workers,
        logging_dir=str(output) + "-logs",
    ).run()


def ids(corpus: Path, tokenizer: str, output: Path, workers: int) -> None:
    """Write the ids that the tokenizers library gives, document by document (not timed)."""
    import numpy
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    encoder.encode_special_tokens = True
    with output.open("wb") as file:
        for path in files_of(corpus):
            texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
            for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
                row = numpy.array([len(encoding.ids), *encoding.ids], dtype="<u4")
                file.write(row.tobytes())


def files_of(corpus: Path) -> list[Path]:
    """Return the files in the order in which Ekiden reads them."""
    return sorted(corpus.rglob("*.jsonl"))


def main() -> None:
    what, corpus, tokenizer, output, workers = sys.argv[1:]
    if what == "versions":
        names = ("datasets", "datatrove", "tokenizers", "transformers")
        print(json.dumps({name: importlib.metadata.version(name) for name in names}))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if what != "ids" else "true"
    run = {"datasets": with_datasets, "datatrove": with_datatrove, "ids": ids}[what]
    run(Path(corpus), tokenizer, Path(output), int(workers))


if __name__ == "__main__":
    main()
