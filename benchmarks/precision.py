"""Does 16-bit training follow fp32, and how large do its activations get?

    python benchmarks/precision.py --corpus CORPUS --folder OUT --steps 60

Trains each family with the default recipe in fp32 and in bf16 (in fp16 too where there is a GPU), same seed, same
data, with the models, the shards and `train` of `benchmarks/learning.py`. Prints the validation loss of each, and the largest
absolute value that any module of the fp32 model puts out on the test text at the end, beside fp16's largest number.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from learning import COMMON, SHAPES, prepare

FP16_MAX = 65504.0


def nats_of(place: Path) -> float:
    """Return the mean loss over languages, in nats a token, at the end of the run in `place`."""
    from ekiden.training.history import read_history

    last = [record for record in read_history(place / "history.jsonl") if record["kind"] == "eval"][-1]
    return sum(figures["loss"] for figures in last["languages"].values()) / len(last["languages"])


def train_in(precision: str, family: str, shards: Path, place: Path, steps: int) -> float:
    """Train `family` in `precision`; return the validation loss in nats a token."""
    from ekiden.config import build_config
    from ekiden.training.loop import train

    settings = {**SHAPES[family], **COMMON, "precision": precision, "dataset_path": str(shards)}
    settings |= {"output_dir": str(place), "max_steps": steps, "num_threads": 1, "eval_tokens": 8192}
    settings |= {"eval_steps": 0, "save_steps": 0, "sample_tokens": 1, "report": False}
    if not (place / "result.json").exists() or '"completed"' not in (place / "result.json").read_text():
        train(build_config(settings.pop("preset"), **settings))
    return nats_of(place)


@torch.no_grad()
def largest_activation(model_folder: Path, shards: Path) -> tuple[str, float]:
    """Return the module whose output is largest on 1,024 test tokens of each language, and how large it is."""
    from transformers import AutoModelForCausalLM

    from ekiden.tokens.format import TokenDataset

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    largest = ("", 0.0)

    def watch(name: str) -> Any:
        def look(_module: Any, _inputs: Any, output: Any) -> None:
            nonlocal largest
            value = output[0] if isinstance(output, tuple) else output
            if torch.is_tensor(value) and (size := float(value.abs().max())) > largest[1]:
                largest = (name, size)

        return look

    for name, module in model.base_model.named_modules():
        if name:
            module.register_forward_hook(watch(name))
    dataset = TokenDataset.open(shards)
    for language in dataset.languages:
        ids = torch.from_numpy(dataset.split(language, "test").read(0, 1024).astype("int64"))
        model.base_model(input_ids=ids.view(4, 256), use_cache=False)
    return largest


def main() -> None:
    """Train what is missing, and print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, help="folder with a sub-folder a language")
    parser.add_argument(
        "--folder", type=Path, required=True, help="shards and runs; learning.py's own may be used"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--family", choices=list(SHAPES), action="append")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    shards = prepare(options.corpus, options.folder, 4096)
    precisions = ["fp32", "bf16", *(["fp16"] if torch.cuda.is_available() else [])]
    figures: dict[str, Any] = {}
    for family in options.family or SHAPES:
        places = {p: options.folder / "precision" / f"{family}-{p}-{options.steps}" for p in precisions}
        nats = {p: train_in(p, family, shards, place, options.steps) for p, place in places.items()}
        name, size = largest_activation(places["fp32"] / "final_model", shards)
        figures[family] = {**{p: round(n, 4) for p, n in nats.items()}, "largest": round(size, 1), "in": name}
        print(
            f"{family}: {nats}, largest activation {size:.1f} in {name}, 1/{FP16_MAX / size:.0f} of fp16's limit"
        )
        assert all(math.isfinite(n) for n in nats.values())
    print(json.dumps({"steps": options.steps, "nats": figures}))


if __name__ == "__main__":
    main()
