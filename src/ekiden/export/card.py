"""The README of an exported model: what it is, and what its run says about how it was made.

Facts come from the run directory around the exported folder (config.yaml, history.jsonl, the newest checkpoint's
manifest); a model without one gets a card without them. Nothing is stated that the run did not record.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ekiden.config import parse_yaml
from ekiden.errors import UserError
from ekiden.modeling.attention import DOCUMENT_MASK
from ekiden.modeling.build import parameter_counts
from ekiden.progress import human_count
from ekiden.tokenizer.load import Tokenizer


@dataclass
class RunFacts:
    """What a run recorded about the model at `step`.

    Attributes:
        dataset_path: of the token shards, as the run was told; they may be gone.
        tokens: seen in training until `step`; None: not recorded.
        languages: {language: figures} of the last evaluation at or before `step`, which was at `eval_step`.
        data: fingerprint of the token shards.
        environment: device, precision and versions of the last start.
    """

    step: int
    preset: str = ""
    dataset_path: Path | None = None
    max_length: int | None = None
    tokens: int | None = None
    eval_step: int | None = None
    languages: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)


def run_facts(folder: Path, step: int | None) -> RunFacts | None:
    """Return what the run around a model's `folder` recorded; None where it is no run's.

    Args:
        folder: RUN/best, RUN/final_model or RUN/checkpoints/step-N; another folder is not the run's, wherever it lies.
        step: of the model, from its manifest.
    """
    absolute = folder.absolute()
    run = absolute.parent.parent if absolute.parent.name == "checkpoints" else absolute.parent
    is_of_run = run != absolute.parent or absolute.name in ("best", "final_model")
    if step is None or not is_of_run or not (run / "config.yaml").is_file():
        return None
    facts = RunFacts(step)
    try:
        settings = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"), str(run / "config.yaml"))
    except (OSError, ValueError, UserError):
        settings = {}
    facts.preset = str(settings.get("preset") or settings.get("model_type") or "")
    facts.dataset_path = Path(str(settings["dataset_path"])) if settings.get("dataset_path") else None
    facts.max_length = settings.get("max_length")
    _read_history(run / "history.jsonl", facts)
    facts.data = _data_fingerprint(run / "checkpoints")
    return facts


def _read_history(path: Path, facts: RunFacts) -> None:
    """Fill in the last figures at or before the step."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
            kind, step = record["kind"], record["step"]
        except (ValueError, KeyError, TypeError):
            continue  # the line that a kill tore
        if kind == "event" and record.get("event") in ("start", "resume"):
            facts.environment = record.get("environment", {})
        if step > facts.step:
            continue
        if kind == "train":
            # Steps in between are not all logged; each had as many tokens as those before.
            facts.tokens = record["tokens"] * facts.step // step
        elif kind == "eval":
            facts.eval_step, facts.languages = step, record.get("languages", {})


def _data_fingerprint(checkpoints: Path) -> str | None:
    for path in sorted(checkpoints.glob("step-*/trainer_state.json"), reverse=True):
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["identity"]["data"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def model_card(
    model: PreTrainedModel, tokenizer: Tokenizer, facts: RunFacts | None = None, file: str | None = None
) -> str:
    """Return a README that says what the model is, how it was made, and how to load it.

    Args:
        file: name of the one file that is the model, where it is not a Hugging Face folder.
    """
    header = ["library_name: transformers"] if file is None else []
    parts = [
        "\n".join(["---", *header, "pipeline_tag: text-generation", "---"]),
        f"# A {type(model).__name__} trained from scratch with Ekiden",
        _what_it_is(model, tokenizer),
        *([_training(facts, tokenizer)] if facts else []),
        *([_evaluation(facts)] if facts and facts.languages else []),
        _loading(file),
        "No licence is stated: whoever publishes this model chooses one (`license:` at the top of this file).",
    ]
    return "\n\n".join(parts) + "\n"


def _what_it_is(model: PreTrainedModel, tokenizer: Tokenizer) -> str:
    blocks, embedding = parameter_counts(model)
    begin = "" if tokenizer.bos_id is None else f"id {tokenizer.bos_id}, then "
    return (
        f"{human_count(blocks)} parameters in blocks, {human_count(embedding)} in the embedding (shared with the output).\n"
        f"{tokenizer.vocab_size} pieces ({tokenizer.kind}, {tokenizer.model_type}), context of "
        f"{model.config.max_position_embeddings} tokens.\n"
        f"A base model: it continues text and follows no instructions. It has read each document as {begin}its text."
        + (
            "\nIn training a token saw its own document alone."
            if getattr(model.config, DOCUMENT_MASK, False)
            else ""
        )
    )


def _training(facts: RunFacts, tokenizer: Tokenizer) -> str:
    rows = [
        ("step", f"{facts.step:,}"),
        ("tokens seen", None if facts.tokens is None else f"{facts.tokens:,}"),
        ("languages", ", ".join(facts.languages) or None),
        ("recipe", facts.preset or None),
        ("sample length", None if facts.max_length is None else f"{facts.max_length} tokens"),
        ("data, SHA-256", facts.data),
        ("tokenizer, SHA-256", tokenizer.sha256),
        ("made on", ", ".join(f"{name} {value}" for name, value in facts.environment.items()) or None),
    ]
    table = [f"| {name} | {value} |" for name, value in rows if value is not None]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *table])


def _evaluation(facts: RunFacts) -> str:
    lines = [
        "## Evaluation",
        "",
        f"On text held out from training, at step {facts.eval_step:,}. Bits per byte compare between tokenizers.",
        "",
        "| language | bits per byte | loss, nats a token | tokens |",
        "|---|---|---|---|",
    ]
    for language, figures in facts.languages.items():
        bits, loss = (
            f"{value:.4f}" if isinstance(value := figures.get(name), float) else "not measured"
            for name in ("bits_per_byte", "loss")
        )
        lines.append(f"| {language} | {bits} | {loss} | {figures.get('tokens', 0):,} |")
    return "\n".join(lines)


def _loading(file: str | None) -> str:
    if file is not None and file.endswith(".gguf"):
        return f'```\nllama-completion -m {file} -p "Once upon a time"\n```'
    if file is not None:
        return (
            "`google/gemma_pytorch` loads it with `GemmaForCausalLM(config).load_weights`; the values of `config` are in "
            f'the file itself:\n\n```python\nimport torch\n\nvalues = torch.load("{file}", weights_only=True)'
            '["gemma_config"]\n```'
        )
    return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
```"""
