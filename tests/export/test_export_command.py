"""`ekiden export`: every format from a run directory, the card's facts, the hub, and mistakes in one sentence."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

import ekiden
from ekiden.checkpoint.store import replace_folder
from ekiden.cli import main
from ekiden.errors import UsageError, UserError
from ekiden.export import hub
from ekiden.export.command import export_model
from ekiden.export.huggingface import model_folder_files, model_tensors
from ekiden.tokenizer.load import load_tokenizer
from ekiden.tokenizer.train import train_tokenizer
from small_models import small_model


@pytest.fixture(scope="module")
def run(language_folder, tmp_path_factory):
    """A run directory as the trainer leaves it: shards, settings, history, best/."""
    root = tmp_path_factory.mktemp("run")
    train_tokenizer([str(language_folder)], str(root / "t.model"), vocab_size=430, model_type="bpe")
    ekiden.preprocess([str(language_folder)], str(root / "t.model"), str(root / "shards"), test_split=0.2)
    tokenizer = load_tokenizer(root / "t.model")
    model = small_model("gemma3-tiny", tokenizer)

    def write(writer):
        for name, content in model_folder_files(model, tokenizer).items():
            writer.bytes(name, content)
        writer.tensors("model.safetensors", model_tensors(model), metadata={"format": "pt"})

    folder = root / "run"
    folder.mkdir()
    replace_folder(folder / "best", write, {"step": 25})
    (folder / "config.yaml").write_text(
        f"preset: gemma3-tiny\ndataset_path: {root / 'shards'}\nmax_length: 32\n"
    )
    figures = {"loss": 2.5, "bits_per_byte": 1.25, "tokens": 400, "bytes": 1000}
    records = [
        {"kind": "event", "step": 0, "event": "start", "environment": {"device": "a processor"}},
        {"kind": "train", "step": 20, "loss": 3.0, "tokens": 2000},
        {
            "kind": "eval",
            "step": 20,
            "languages": {"dutch": figures, "hindi": {**figures, "bits_per_byte": None}},
        },
        {"kind": "train", "step": 40, "loss": 3.0, "tokens": 4000},
        {"kind": "eval", "step": 40, "languages": {"dutch": {**figures, "bits_per_byte": 9.0}}},
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "history.jsonl").write_text("\n".join([*lines, '{"kind": "train", "st']))
    state = folder / "checkpoints" / "step-00000025" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"identity": {"data": "d" * 64}}))
    return folder


def test_a_folder_with_the_runs_facts(run, tmp_path):
    lines = export_model(run, "hf", tmp_path / "out", "bf16")
    assert lines == [f"{tmp_path / 'out'}: {run / 'best'} as hf, bf16"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "| step | 25 |",
        "| tokens seen | 2,500 |",
        "| languages | dutch, hindi |",
        f"| data, SHA-256 | {'d' * 64} |",
        "at step 20.",
        "| dutch | 1.2500 | 2.5000 | 400 |",
        "| hindi | not measured | 2.5000 | 400 |",
        "device a processor",
        "No licence is stated",
    ):
        assert fact in card, fact
    # Nothing that came after the model.
    assert "9.0" not in card


def test_a_folder_of_no_run_has_a_card_without_facts(run, tmp_path):
    export_model(run, "hf", tmp_path / "first")
    export_model(tmp_path / "first", "hf", tmp_path / "second")
    card = (tmp_path / "second" / "README.md").read_text()
    assert "430 pieces" in card
    assert "## Training" not in card


def test_gguf_compares_tokens_on_the_runs_text(run, tmp_path):
    pytest.importorskip("gguf")
    lines = export_model(run, "gguf", tmp_path / "m.gguf", "q8_0")
    assert "texts have the same ids by" in lines[1]
    equal, texts = (int(word) for word in lines[1].split() if word.isdigit())
    assert equal == texts > 20
    (tmp_path / "own.txt").write_text("A river.\n\nAnother river.\n")
    assert (
        "2 of 2 texts" in export_model(run, "gguf", tmp_path / "m.gguf", check_text=tmp_path / "own.txt")[1]
    )


def test_gguf_says_where_tokens_were_not_compared(run, tmp_path):
    pytest.importorskip("gguf")
    export_model(run, "hf", tmp_path / "out")
    line = export_model(tmp_path / "out", "gguf", tmp_path / "m.gguf")[1]
    assert line == (
        "its tokens were not compared with llama.cpp's (the model lies in no run directory); give --check-text FILE to "
        "compare them"
    )


def test_the_verb(run, tmp_path, capsys):
    main(["export", str(run), "--format", "gemma-pytorch", "--output", str(tmp_path / "m.ckpt")])
    assert capsys.readouterr().out == f"{tmp_path / 'm.ckpt'}: {run / 'best'} as gemma-pytorch, fp32\n"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run), "--format", "onnx", "--output", str(tmp_path / "m")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "ekiden: --format onnx is not one of hf, gguf, gemma-pytorch\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"output_format": "hf", "dtype": "q8_0"},
            "--dtype q8_0 is not one that --format hf has: fp32, bf16, fp16",
        ),
        ({"output_format": "hf", "check_text": "x.txt"}, "--check-text is for --format gguf"),
        ({"output_format": "hf", "push_repository": "model"}, "--push-to-hub model is not OWNER/NAME"),
        ({"output_format": "hf", "push_repository": "../x"}, "is not OWNER/NAME"),
    ],
)
def test_mistakes_are_found_before_the_model_is_read(arguments, sentence, tmp_path):
    with pytest.raises(UsageError, match=sentence):
        export_model(tmp_path / "no model", output=tmp_path / "out", **arguments)


class Hub:
    """Stands in for the hub and records what it is asked to do."""

    calls: ClassVar[list[tuple[str, dict]]] = []

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, {**dict(enumerate(arguments)), **options}))
            return "https://hub/owner/name"

        return call


def test_pushing(run, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="needs a Hugging Face token: run `hf auth login`"):
        export_model(run, "hf", tmp_path / "out", push_repository="owner/name")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    lines = export_model(run, "hf", tmp_path / "out", push_repository="owner/name")
    assert lines[-1] == "pushed to https://hub/owner/name (new repositories are private)"
    names = [name for name, _options in Hub.calls]
    assert names == ["create_repo", "upload_folder"]
    assert Hub.calls[0][1]["private"] is True
    assert Hub.calls[1][1]["ignore_patterns"] == ["MANIFEST.json"]
    Hub.calls.clear()
    export_model(run, "gemma-pytorch", tmp_path / "m.ckpt", push_repository="owner/name")
    assert [options.get("path_in_repo") for _name, options in Hub.calls] == [None, "m.ckpt", "README.md"]
    assert b'torch.load("m.ckpt", weights_only=True)' in Hub.calls[2][1]["path_or_fileobj"]


def test_a_push_that_fails_keeps_the_export(run, tmp_path, monkeypatch):
    import huggingface_hub

    class Refusing:
        def create_repo(self, *_arguments, **_options):
            raise RuntimeError("403 Forbidden\nmore")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    with pytest.raises(UserError, match=r"was exported but not pushed to owner/name \(403 Forbidden\)"):
        export_model(run, "hf", tmp_path / "out", push_repository="owner/name")
    assert (tmp_path / "out" / "config.json").is_file()
    assert hub.check_push("owner/na.me-1") is None
