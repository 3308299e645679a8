"""bf16 and fp16 beside fp32 over a short training, and the largest value inside the trained model.

    python benchmarks/low_precision.py [--steps 100] [--fp16]
    python benchmarks/low_precision.py --model RUN/final_model --dataset-path SHARDS

Trains GPT-2 and Gemma 3 of 3 layers x 64 on the built-in corpus with Ekiden's own `train`, the same data in both
precisions, 4 x 128 tokens a step, one thread. `--fp16` trains in fp16 with loss scaling too (Muon's products are fp32 on a
CPU). The last line is one JSON object: the mean training loss over the last ten steps in nats a token for each, the steps
that were skipped, and the largest absolute value that any module but the head took in or put out for test text (fp16 ends
at 65,504); with `--model` that of a model already trained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import ekiden
from ekiden.config import build_config
from ekiden.tokenizer.train import train_tokenizer
from ekiden.tokens.format import TokenDataset
from ekiden.training.history import read_history

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 32}
SHAPE |= {"intermediate_size": 256, "max_length": 128, "batch_size": 4, "gradient_accumulation_steps": 1}


def train(preset: str, precision: str, shards: Path, output: Path, steps: int) -> tuple[float, int]:
    """Train, and return the mean loss of the last ten steps and how many steps were skipped."""
    shape: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2 if preset == "gpt2-10m" else 1}
    config = build_config(
        preset,
        dataset_path=str(shards),
        output_dir=str(output),
        max_steps=steps,
        eval_steps=0,
        log_steps=1,
        precision=precision,
        device="cpu",
        num_threads=1,
        compile="off",
        report=False,
        **shape,
    )
    ekiden.train(config)
    records = list(read_history(output / "history.jsonl"))
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    skipped = sum(r.get("event") == "skip" for r in records)
    return sum(losses[-10:]) / len(losses[-10:]), skipped


def largest_value(folder: Path, shards: Path) -> float:
    """Return the largest absolute value that a module below the head takes in or puts out.

    It is given the first 4 x 128 test tokens of every language of `shards`, and as many random pieces.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    values = [0.0]

    def look(_module: Any, inputs: Any, output: Any) -> None:
        for value in (*inputs, *(output if isinstance(output, tuple) else (output,))):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                values.append(value.abs().max().item())

    for module in model.base_model.modules():
        module.register_forward_hook(look)
    torch.manual_seed(0)
    dataset = TokenDataset.open(shards)
    batches = [torch.randint(0, model.config.vocab_size, (512,))]
    for language in dataset.languages:
        test = dataset.split(language, "test")
        batches.append(torch.from_numpy(test.read(0, min(512, test.tokens)).astype("int64")))
    with torch.no_grad():
        for ids in batches:
            model(ids[: len(ids) // 4 * 4].view(4, -1))
    return max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--fp16", action="store_true", help="train in fp16 with loss scaling too")
    parser.add_argument("--model", type=Path, help="only look at this model")
    parser.add_argument("--dataset-path", type=Path, help="token shards of that model")
    options = parser.parse_args()
    if options.model:
        if not options.dataset_path:
            parser.error("--model needs --dataset-path")
        print(json.dumps({"largest_value": round(largest_value(options.model, options.dataset_path), 1)}))
        return
    result: dict[str, Any] = {"steps": options.steps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = Path(ekiden.__file__).parent / "sample_corpus"
        train_tokenizer([str(corpus)], str(folder / "my.model"), vocab_size=2000)
        ekiden.preprocess([str(corpus)], str(folder / "my.model"), str(folder / "shards"))
        for preset in ("gpt2-10m", "gemma3-tiny"):
            figures: dict[str, float] = {}
            for precision in ("fp32", "bf16", "fp16") if options.fp16 else ("fp32", "bf16"):
                output = folder / f"{preset}-{precision}"
                loss, skipped = train(preset, precision, folder / "shards", output, options.steps)
                figures |= {precision: round(loss, 4), f"{precision}_skipped": skipped}
            trained = folder / f"{preset}-fp32" / "final_model"
            figures["largest_value"] = round(largest_value(trained, folder / "shards"), 1)
            result[preset] = figures
    print(json.dumps(result))


if __name__ == "__main__":
    main()
