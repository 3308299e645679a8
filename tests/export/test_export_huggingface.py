"""An exported folder is the model: for plain transformers, in every precision, or not written at all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ekiden.checkpoint.store import CheckpointStore
from ekiden.errors import UserError
from ekiden.export.huggingface import export_huggingface, model_folder_files
from ekiden.export.load import load_model
from ekiden.generation import continuation, generate
from small_models import TEXT, small_model

FAMILIES = ("gpt2-10m", "gemma3-tiny")


@pytest.mark.parametrize("preset", FAMILIES)
def test_plain_transformers_gives_the_same_logits(preset, tokenizer, tmp_path):
    model = small_model(preset, tokenizer).train()
    export_huggingface(model, tokenizer, tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(other) is type(model)
    assert next(other.parameters()).dtype == torch.float32
    ids = torch.randint(340, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = other(input_ids=ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert model.training
    assert model.config.use_cache is False


@pytest.mark.parametrize("preset", FAMILIES)
def test_plain_transformers_writes_the_same_text(preset, tokenizer, tmp_path):
    model = small_model(preset, tokenizer)
    export_huggingface(model, tokenizer, tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    seen = set()
    for prompt in ("The river", "नदी", "De kinderen lopen", "water"):
        ids = torch.tensor([[tokenizer.bos_id, *their_tokenizer.encode(prompt, add_special_tokens=False)]])
        made = other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False)[0]
        new = made[ids.shape[1] :].tolist()
        ours = generate(model, tokenizer, [prompt], max_new_tokens=15, temperature=0, repetition_penalty=1)[0]
        assert ours == continuation(tokenizer, ids[0].tolist(), new)
        seen |= set(new)
    assert len(seen) > 3


def test_plain_transformers_gives_the_same_ids(any_tokenizer, tmp_path):
    export_huggingface(small_model("gemma3-tiny", any_tokenizer), any_tokenizer, tmp_path / "out")
    other = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [*TEXT, " two  spaces ", "Ünïcode ☂ and\ttabs\nand lines", "", "नदी\u200d"]
    for text in texts:
        assert other.encode(text, add_special_tokens=False) == any_tokenizer.encode(text), text
        assert other.decode(any_tokenizer.encode(text)) == any_tokenizer.decode(any_tokenizer.encode(text))
    special = (other.bos_token_id, other.eos_token_id, other.pad_token_id)
    assert special == (any_tokenizer.bos_id, any_tokenizer.eos_id, any_tokenizer.pad_id)
    assert other.model_max_length == 32


@pytest.mark.parametrize("preset", FAMILIES)
def test_the_files_say_what_they_hold(preset, tokenizer, tmp_path):
    model = small_model(preset, tokenizer)
    folder = export_huggingface(model, tokenizer, tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert names == {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in names
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert (config["dtype"], config["use_cache"], config["tie_word_embeddings"]) == ("float32", True, True)
    assert (config["pad_token_id"], config["eos_token_id"], config["bos_token_id"]) == (0, 1, 2)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.pad_token_id, generation.eos_token_id, generation.bos_token_id) == (0, 1, 2)
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.files["tokenizer.model"]
    assert "340 pieces" in (folder / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bit_exports(dtype, tokenizer, tmp_path):
    model = small_model("gemma3-tiny", tokenizer)
    export_huggingface(model, tokenizer, tmp_path / "out", dtype)
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {weight.dtype for weight in other.parameters()} == {expected}
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert torch.equal(ours.to(expected), theirs)
    sizes = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert sizes < 2.1 * sum(weight.numel() for weight in model.parameters()) + 10_000


def test_a_weight_beyond_fp16_is_refused_and_nothing_written(tokenizer, tmp_path):
    model = small_model("gemma3-tiny", tokenizer)
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    with pytest.raises(UserError, match=r"model.norm.weight holds values that are not finite in float16"):
        export_huggingface(model, tokenizer, tmp_path / "out", "fp16")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="--dtype int8 is not one of fp32, bf16, fp16"):
        export_huggingface(model, tokenizer, tmp_path / "out", "int8")


def test_an_earlier_export_is_replaced_and_nothing_else(tokenizer, tmp_path):
    model, target = small_model("gemma3-tiny", tokenizer), tmp_path / "out"
    target.mkdir()
    export_huggingface(model, tokenizer, target)
    export_huggingface(model, tokenizer, target, "bf16")
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files that are not an earlier export's \(thesis.tex\)"):
        export_huggingface(model, tokenizer, target)
    assert (target / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="is a file; give the folder"):
        export_huggingface(model, tokenizer, target / "thesis.tex")
    checkpoint = CheckpointStore(tmp_path / "run").save(3, lambda w: w.json("trainer_state.json", {}))
    with pytest.raises(UserError, match="holds files that are not an earlier export's"):
        export_huggingface(model, tokenizer, checkpoint.path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes").write_text("mine")
    with pytest.raises(UserError, match="notes"):
        export_huggingface(model, tokenizer, tmp_path / "work")


def test_tokenizers_without_special_ids(tmp_path):
    from small_models import small_tokenizer

    bare = small_tokenizer(tmp_path, pad_id=-1, bos_id=-1, eos_id=-1, unk_id=0)
    model = small_model("gemma3-tiny", bare)
    contents = model_folder_files(model, bare)
    assert set(json.loads(contents["generation_config.json"])) == {"transformers_version"}
    config = json.loads(contents["config.json"])
    assert [config.get(f"{name}_token_id") for name in ("pad", "bos", "eos")] == [None] * 3
    other = AutoModelForCausalLM.from_pretrained(export_huggingface(model, bare, tmp_path / "out"))
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(other(ids).logits, model(ids, use_cache=False).logits, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_large_models_are_several_files(dtype, tokenizer, tmp_path):
    model = small_model("gemma3-tiny", tokenizer)
    export_huggingface(model, tokenizer, tmp_path / "whole", dtype)
    export_huggingface(model, tokenizer, tmp_path / "out", dtype, shard_bytes=40_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max(weight.numel() * weight.element_size() for weight in model.parameters())
    for name in files:
        assert (tmp_path / "out" / name).stat().st_size < max(40_000, largest) + 8_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {name for name, _ in model.named_parameters()}
    assert set(index["weight_map"].values()) == set(files)
    whole, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("whole", "out")
    )
    for one, two in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert load_model(tmp_path / "out", "cpu").model.config.vocab_size == 340
    export_huggingface(model, tokenizer, tmp_path / "out", dtype)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == ["model.safetensors"]


def test_an_edited_card_is_neither_damage_nor_lost(tokenizer, tmp_path):
    model, target = small_model("gemma3-tiny", tokenizer), tmp_path / "out"
    export_huggingface(model, tokenizer, target)
    with (target / "README.md").open("a") as file:
        file.write("My licence.")
    assert load_model(target, "cpu").path == target
    with pytest.raises(UserError, match=r"holds a README.md that was edited"):
        export_huggingface(model, tokenizer, target)
    assert (target / "README.md").read_text().endswith("My licence.")
    (target / "README.md").unlink()
    export_huggingface(model, tokenizer, target)
    assert (target / "README.md").is_file()


def test_a_disk_that_fails_is_one_sentence(tokenizer, tmp_path, monkeypatch):
    from ekiden.checkpoint import files

    def fail(operation, path):
        if operation == "fsync" and path.name.endswith(".safetensors"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fault_hook", fail)
    with pytest.raises(UserError, match="the disk is full"):
        export_huggingface(small_model("gemma3-tiny", tokenizer), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
