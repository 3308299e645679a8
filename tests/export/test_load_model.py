"""Any MODEL: which folder of a run is taken, and what is refused in a sentence."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ekiden.checkpoint.store import CheckpointStore, replace_folder
from ekiden.errors import UserError
from ekiden.export.huggingface import export_huggingface, model_folder_files, model_tensors
from ekiden.export.load import find_model, load_model
from small_models import small_model, small_tokenizer


def writing(model, tokenizer):
    def write(writer):
        for name, content in model_folder_files(model, tokenizer).items():
            writer.bytes(name, content)
        writer.tensors("model.safetensors", model_tensors(model), metadata={"format": "pt"})

    return write


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model("gemma3-tiny", tokenizer)


@pytest.fixture
def run(model, tokenizer, tmp_path):
    """A run directory with best/ (step 20), checkpoints of steps 20 and 30, and final_model/ (step 30)."""
    write = writing(model, tokenizer)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for step in (20, 30):
        store.save(step, write)
    for name, step in (("best", 20), ("final_model", 30)):
        replace_folder(tmp_path / "run" / name, write, {"step": step})
    return tmp_path / "run"


def damage(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def test_a_run_means_its_best_then_newest_then_final(run):
    found = []
    while True:
        folder = find_model(run)
        found.append(folder.name)
        if folder.name == "final_model":
            break
        shutil.rmtree(folder)
    assert found == ["best", "step-00000030", "step-00000020", "final_model"]
    shutil.rmtree(folder)
    with pytest.raises(
        UserError, match=r"holds no model \(looked for config.json, then best/, checkpoints/step-N/"
    ):
        find_model(run)


def test_damaged_ones_are_passed_over_and_said(run, capsys):
    damage(run / "best")
    (run / "checkpoints" / "step-00000030" / "MANIFEST.json").write_text("{")
    before = sorted(path.name for path in run.rglob("*"))
    loaded = load_model(run, "cpu")
    assert (loaded.path.name, loaded.step) == ("step-00000020", 20)
    said = capsys.readouterr().err
    assert "passed over best" in said
    assert "passed over step-00000030" in said
    # A trainer may be at work in there: nothing is renamed or removed.
    assert sorted(path.name for path in run.rglob("*")) == before


def test_a_damaged_model_that_was_asked_for_is_refused(run):
    damage(run / "best")
    with pytest.raises(UserError, match=r"best is damaged \(model.safetensors has hash"):
        load_model(run / "best", "cpu")


def test_a_checkpoint_and_a_folder_of_somebody_else(run, model, tokenizer, tmp_path):
    checkpoint = load_model(run / "checkpoints" / "step-00000030", torch.device("cpu"))
    assert checkpoint.step == 30
    shutil.copytree(run / "best", tmp_path / "plain")
    (tmp_path / "plain" / "MANIFEST.json").unlink()
    plain = load_model(str(tmp_path / "plain"), "cpu")
    assert plain.step is None
    assert plain.tokenizer.sha256 == tokenizer.sha256
    for loaded in (checkpoint, plain):
        assert not loaded.model.training
        for ours, theirs in zip(model.parameters(), loaded.model.parameters()):
            assert torch.equal(ours, theirs)


def test_sixteen_bit_weights_load_as_asked(model, tokenizer, tmp_path):
    folder = export_huggingface(model, tokenizer, tmp_path / "half", "bf16")
    assert load_model(folder, "cpu").model.dtype == torch.float32
    assert load_model(folder, "cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_what_is_not_a_model(tmp_path, run):
    (tmp_path / "a-file").write_text("")
    with pytest.raises(UserError, match="a-file is a file; give a run directory"):
        find_model(tmp_path / "a-file")
    with pytest.raises(UserError, match="does not exist; give a run directory"):
        load_model(tmp_path / "nowhere", "cpu")
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path, "cpu")
    broken = tmp_path / "broken"
    shutil.copytree(run / "best", broken)
    (broken / "MANIFEST.json").unlink()
    (broken / "config.json").write_text("{not json")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(broken, "cpu")


def test_weights_that_are_not_the_configs(run, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(run / "best", folder)
    (folder / "MANIFEST.json").unlink()
    # Copies: what is loaded may be the mapped file, which is written over below.
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    missing = {name: tensor for name, tensor in weights.items() if "layers.2.mlp.up_proj" not in name}
    save_file(missing, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys: model.layers.2.mlp.up_proj.weight"):
        load_model(folder, "cpu")
    save_file({**weights, "extra": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="unexpected keys: extra"):
        load_model(folder, "cpu")
    save_file(
        {**weights, "model.norm.weight": torch.ones(7)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError):
        load_model(folder, "cpu")


def test_pickles_are_not_read(run, model, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(run / "best", folder)
    (folder / "MANIFEST.json").unlink()
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(folder, "cpu")


def test_tokenizers(run, model, tokenizer, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(run / "best", folder)
    for name in ("MANIFEST.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_model(folder, "cpu")
    path = tmp_path / "own.model"
    path.write_bytes(tokenizer.files["tokenizer.model"])
    assert load_model(folder, "cpu", tokenizer=path).tokenizer.sha256 == tokenizer.sha256
    larger = small_tokenizer(tmp_path, vocab_size=346)
    for name, data in larger.files.items():
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match="346 pieces and the model 340"):
        load_model(folder, "cpu")
