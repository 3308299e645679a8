"""`ekiden export`: any MODEL, in the format that somebody else's program reads."""

from __future__ import annotations

from pathlib import Path

from ekiden.errors import UsageError
from ekiden.export.card import RunFacts, model_card, run_facts
from ekiden.export.gemma_pytorch import export_gemma_pytorch
from ekiden.export.gguf import export_gguf
from ekiden.export.hub import check_push, push_to_hub
from ekiden.export.huggingface import export_huggingface
from ekiden.export.load import LoadedModel, load_model
from ekiden.export.token_check import read_texts, sample_texts

FORMATS = {
    "hf": ("fp32", "bf16", "fp16"),
    "gguf": ("fp32", "bf16", "fp16", "q8_0"),
    "gemma-pytorch": ("fp32", "bf16", "fp16"),
}
_SYNONYMS = {"f32": "fp32", "f16": "fp16"}


def export_model(
    path: str | Path,
    output_format: str,
    output: str | Path,
    dtype: str = "fp32",
    check_text: str | Path | None = None,
    push_repository: str | None = None,
) -> list[str]:
    """Export the model at `path`; return what was done, a sentence a line.

    Args:
        path: run directory, checkpoint or Hugging Face folder.
        output_format: a key of FORMATS. output: folder (hf) or file to write.
        dtype: of the stored weights, one of the format's.
        check_text: GGUF: file of text to compare tokens on instead of the run's test split.
        push_repository: OWNER/NAME on the hub, to upload the result to.

    Raises:
        UserError: the format cannot hold this model, or the target cannot be written.
    """
    if output_format not in FORMATS:
        raise UsageError(f"--format {output_format} is not one of {', '.join(FORMATS)}")
    dtype = _SYNONYMS.get(dtype, dtype)
    if dtype not in FORMATS[output_format]:
        raise UsageError(
            f"--dtype {dtype} is not one that --format {output_format} has: {', '.join(FORMATS[output_format])}"
        )
    if check_text is not None and output_format != "gguf":
        raise UsageError("--check-text is for --format gguf: the other formats keep the tokenizer itself")
    if push_repository:
        check_push(push_repository)
    target = Path(output)
    loaded = load_model(path, "cpu")
    facts = run_facts(loaded.path, loaded.step)
    lines = []
    if output_format == "hf":
        export_huggingface(loaded.model, loaded.tokenizer, target, dtype, facts)
    elif output_format == "gguf":
        lines.append(_export_gguf(loaded, target, dtype, facts, check_text))
    else:
        export_gemma_pytorch(loaded.model, target, dtype)
    lines.insert(0, f"{target}: {loaded.path} as {output_format}, {dtype}")
    if push_repository:
        card = None if target.is_dir() else model_card(loaded.model, loaded.tokenizer, facts, target.name)
        lines.append(f"pushed to {push_to_hub(target, push_repository, card)} (new repositories are private)")
    return lines


def _export_gguf(
    loaded: LoadedModel, target: Path, dtype: str, facts: RunFacts | None, check_text: str | Path | None
) -> str:
    """Write the GGUF file and return what is known about its tokens."""
    texts, missing = [], "the model lies in no run directory"
    if check_text is not None:
        texts = read_texts(Path(check_text))
    elif facts and facts.dataset_path and (facts.dataset_path / "dataset.json").is_file():
        texts = sample_texts(loaded.tokenizer, facts.dataset_path)
        missing = f"{facts.dataset_path} holds no test text that was not normalised"
    elif facts:
        missing = f"the run's token shards are not at {facts.dataset_path}"
    compared = export_gguf(loaded.model, loaded.tokenizer, target, dtype, texts)
    if compared is None:
        return f"its tokens were not compared with llama.cpp's ({missing}); give --check-text FILE to compare them"
    return f"tokens: {compared}"
