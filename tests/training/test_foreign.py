"""Checkpoints of other programs, and Ekiden's own in other formats: what is taken, and what a run makes of it."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from ekiden.checkpoint.convert import convert_checkpoint
from ekiden.config import TrainConfig
from ekiden.errors import UserError
from ekiden.export.load import load_model
from ekiden.training.converted import open_any
from ekiden.training.foreign import take_foreign
from ekiden.training.loop import train
from ekiden.training.rundir import RunDirectory
from ekiden.training.start import prepare
from ekiden.training.state import TrainingState

Settings = Callable[..., TrainConfig]
GPT2 = {"preset": "gpt2-10m", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def fresh(settings: Settings, **more: Any) -> TrainingState:
    """Return the state of a run before its first step."""
    config = settings(
        8, **{**GPT2, "intermediate_size": 64, "weight_decay": 0.0, "seed": 99, "optimizer": "adamw", **more}
    )
    return prepare(config, RunDirectory(config.output_dir)).state


class PlainScript:
    """What people write: GPT-2, AdamW over model.parameters(), a LambdaLR, a dict of state dicts."""

    def __init__(self, state: TrainingState, batches: torch.Tensor) -> None:
        torch.manual_seed(3)
        self.batches, self.step = batches, 0
        self.model = GPT2LMHeadModel(state.model.config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.loss = float("nan")

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(one_step(self.model, self.optimizer, self.batches[self.step]))
            self.scheduler.step()
            self.step += 1
        self.loss = losses[-1]
        return losses

    def checkpoint(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "loss": self.loss,
        }


def one_step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.fixture
def batches() -> torch.Tensor:
    """Return 40 batches [4, 32] of tokens that a model can learn: each row counts upwards from somewhere."""
    start = torch.randint(0, 400, (40, 4, 1), generator=torch.Generator().manual_seed(1))
    return start + torch.arange(32)


@pytest.fixture
def script(settings: Settings, batches: torch.Tensor, tmp_path: Path) -> PlainScript:
    return PlainScript(fresh(settings, output_dir=str(tmp_path / "first")), batches)


@pytest.mark.parametrize("form", ["pt", "json", "readable", "unpacked"])
def test_a_plain_scripts_checkpoint_goes_on_where_it_was(
    script: PlainScript, settings: Settings, batches: torch.Tensor, tmp_path: Path, form: str
) -> None:
    learned = script.train(20)
    assert learned[-1] < learned[0] - 0.5, "the script must have learned something worth keeping"
    path = tmp_path / "script.pt"
    torch.save(script.checkpoint(), path)
    if form in ("json", "readable"):
        path = convert_checkpoint(path, tmp_path / "script.json", readable=form == "readable").path
    elif form == "unpacked":
        path = unpack(path, tmp_path / "unpacked")
    state = fresh(settings, max_steps=60)
    report = take_foreign(path, state)
    assert (report.step, state.counters.step) == (20, 20)
    assert report.weights == report.moments == len(list(script.model.parameters()))
    for group in state.optimizer.param_groups:
        group.update(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0)
    mine = [one_step(state.model, state.optimizer, batches[20 + i]) for i in range(5)]
    theirs = script.train(5)
    # Ekiden's AdamW is the fused kernel, the script's is not: equal but for the last bits.
    assert mine == pytest.approx(theirs, rel=1e-4)
    # And without the moments it is another path: the agreement above is theirs.
    other = fresh(settings, max_steps=60, output_dir=str(tmp_path / "other"))
    take_foreign(path, other, weights_only=True)
    assert other.counters.step == 0 and not other.optimizer.state
    for group in other.optimizer.param_groups:
        group.update(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0)
    apart = [one_step(other.model, other.optimizer, batches[20 + i]) for i in range(5)]
    assert apart[0] == pytest.approx(theirs[0], rel=1e-4)
    assert apart[1:] != pytest.approx(theirs[1:], rel=1e-4)


def unpack(path: Path, folder: Path) -> Path:
    """Do to a `.pt` what a dataset host does."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_taken(state: TrainingState, model: torch.nn.Module) -> None:
    expected = weights_of(model)
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: "module." + name,
        lambda name: "_orig_mod." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "model." + name,
        lambda name: "net.gpt." + name,
        lambda name: name.replace("transformer.", ""),
    ],
    ids=["ddp", "compiled", "both", "wrapper", "two wrappers", "bare decoder"],
)
@pytest.mark.parametrize("place", ["", "model", "state_dict", "module"])
def test_names_and_places_that_scripts_use(
    script: PlainScript, settings: Settings, tmp_path: Path, rename: Callable[[str], str], place: str
) -> None:
    held = OrderedDict((rename(name), value) for name, value in script.model.state_dict().items())
    torch.save({place: held, "iter_num": 7} if place else held, tmp_path / "x.pt")
    state = fresh(settings)
    report = take_foreign(tmp_path / "x.pt", state)
    assert_taken(state, script.model)
    assert report.step == (7 if place else None)
    assert "no optimizer was found" in report.sentence()


def test_muon_takes_adams_first_moment_as_its_momentum(
    script: PlainScript, settings: Settings, batches: torch.Tensor, tmp_path: Path
) -> None:
    script.train(6)
    torch.save(script.checkpoint(), tmp_path / "script.pt")
    state = fresh(settings, optimizer="muon", max_steps=60)
    assert take_foreign(tmp_path / "script.pt", state).moments == len(list(script.model.parameters()))
    theirs = dict(script.model.named_parameters())
    for name, parameter in state.model.named_parameters():
        kept, moments = state.optimizer.state[parameter], script.optimizer.state[theirs[name]]
        key = "momentum_buffer" if parameter.dim() == 2 and ".h." in name else "exp_avg"
        assert torch.equal(kept[key], moments["exp_avg"])
        assert (key == "exp_avg") == ("exp_avg_sq" in kept)
    before = one_step(state.model, state.optimizer, batches[0])
    assert one_step(state.model, state.optimizer, batches[0]) < before


def test_nanogpt_layout_is_turned_with_its_moments(
    script: PlainScript, settings: Settings, batches: torch.Tensor, tmp_path: Path
) -> None:
    """Matrices as nn.Linear's [out, in], the causal mask as a buffer, decay and no-decay groups, compiled names."""
    named = dict(script.model.named_parameters())
    decay = [p for p in named.values() if p.dim() >= 2]
    no_decay = [p for p in named.values() if p.dim() < 2]
    script.optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.0}, {"params": no_decay}], lr=3e-3, weight_decay=0.0
    )
    script.scheduler = torch.optim.lr_scheduler.LambdaLR(script.optimizer, lambda step: 1.0)
    script.train(6)
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    model = OrderedDict()
    for name, value in script.model.state_dict().items():
        model["_orig_mod." + name] = value.t().contiguous() if name.endswith(linear) else value
    for layer in range(2):
        model[f"_orig_mod.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32)
    optimizer = script.optimizer.state_dict()
    turned = [name for name, p in named.items() if p.dim() >= 2] + [
        n for n, p in named.items() if p.dim() < 2
    ]
    for index, name in enumerate(turned):
        if name.endswith(linear):
            for key in ("exp_avg", "exp_avg_sq"):
                turned_moment = optimizer["state"][index][key].t().contiguous()
                optimizer["state"][index] = optimizer["state"][index] | {key: turned_moment}
    torch.save(
        {"model": model, "optimizer": optimizer, "iter_num": 6, "best_val_loss": np.float64(3.5)},
        tmp_path / "ckpt.pt",
    )
    state = fresh(settings, max_steps=60)
    report = take_foreign(tmp_path / "ckpt.pt", state)
    assert_taken(state, script.model)
    assert report.moments == len(named)
    for name, parameter in state.model.named_parameters():
        theirs = script.optimizer.state[named[name]]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(state.optimizer.state[parameter][key], theirs[key]), (name, key)


def test_an_optimizer_with_names_is_taken_in_any_order(
    script: PlainScript, settings: Settings, tmp_path: Path
) -> None:
    reverse = list(script.model.named_parameters())[::-1]
    script.optimizer = torch.optim.AdamW(reverse, lr=3e-3)
    script.train(3)
    torch.save(script.checkpoint(), tmp_path / "x.pt")
    state = fresh(settings, max_steps=60)
    assert take_foreign(tmp_path / "x.pt", state).moments == len(reverse)
    named = dict(script.model.named_parameters())
    for name, parameter in state.model.named_parameters():
        assert torch.equal(
            state.optimizer.state[parameter]["exp_avg"], script.optimizer.state[named[name]]["exp_avg"]
        )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda o: o["state"].pop(3), "cannot be told apart"),
        (lambda o: o["state"][0].pop("exp_avg"), "not Adam's"),
        (lambda o: o["state"][2].update(exp_avg=torch.zeros(5)), "another shape"),
        (lambda o: o["param_groups"].append({"params": []}), "cannot be told apart"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_left_and_said(
    script: PlainScript, settings: Settings, tmp_path: Path, spoil: Callable[[Any], Any], reason: str
) -> None:
    script.train(2)
    checkpoint = script.checkpoint()
    spoil(checkpoint["optimizer_state_dict"])
    torch.save(checkpoint, tmp_path / "x.pt")
    state = fresh(settings, max_steps=60)
    report = take_foreign(tmp_path / "x.pt", state)
    assert reason in report.sentence() and report.moments == 0 and not state.optimizer.state
    assert_taken(state, script.model)


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda weights: weights.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda weights: weights.update({name: value})


NAN = torch.full((32,), float("nan"))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (drop("transformer.h.1.ln_1.weight"), "lacks transformer.h.1.ln_1.weight"),
        (put("transformer.h.2.ln_1.weight", torch.ones(32)), "holds transformer.h.2.ln_1.weight"),
        (
            put("transformer.wpe.weight", torch.ones(64, 32)),
            "has the shape [64, 32], and this model's [32, 32]",
        ),
        (put("lm_head.weight", torch.ones(500, 32)), "output head that is not its embedding"),
        (put("transformer.ln_f.bias", NAN), "transformer.ln_f.bias holds values that are not finite"),
    ],
    ids=["missing", "unexpected", "shape", "untied", "nan"],
)
def test_weights_of_another_model_are_refused_in_a_sentence(
    script: PlainScript, settings: Settings, tmp_path: Path, spoil: Callable[[Any], Any], sentence: str
) -> None:
    weights = script.model.state_dict()
    spoil(weights)
    torch.save({"model_state_dict": weights, "step": 1}, tmp_path / "x.pt")
    state = fresh(settings)
    before = weights_of(state.model)
    with pytest.raises(UserError) as error:
        take_foreign(tmp_path / "x.pt", state)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in state.model.named_parameters())


def test_a_model_without_biases_and_with_only_a_head(
    script: PlainScript, settings: Settings, tmp_path: Path
) -> None:
    weights = {n: v for n, v in script.model.state_dict().items() if not n.endswith(".bias")}
    del weights["transformer.wte.weight"]
    torch.save({"model": weights}, tmp_path / "x.pt")
    state = fresh(settings)
    assert "biases, which it does not have" in take_foreign(tmp_path / "x.pt", state).sentence()
    assert torch.equal(state.model.transformer.wte.weight, script.model.lm_head.weight)
    assert all(not p.any() for name, p in state.model.named_parameters() if name.endswith(".bias"))


def test_more_steps_than_the_run_has_and_no_weights_at_all(
    script: PlainScript, settings: Settings, tmp_path: Path
) -> None:
    torch.save({"model": script.model.state_dict(), "step": 8}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="--max-steps is 8"):
        take_foreign(tmp_path / "x.pt", fresh(settings))
    torch.save({"weights": {"a.b": torch.ones(3)}}, tmp_path / "y.pt")
    with pytest.raises(UserError, match="no weights with names of this model"):
        take_foreign(tmp_path / "y.pt", fresh(settings))


def test_a_hugging_face_folder_and_a_run_are_taken_and_differences_noted(
    settings: Settings, script: PlainScript, tmp_path: Path
) -> None:
    script.model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    state = fresh(settings)
    report = take_foreign(tmp_path / "hf", state, weights_only=True)
    assert_taken(state, script.model)
    assert "its activation_function is relu, this model's gelu_new" in report.sentence()
    train(settings(4))
    again = settings(8, output_dir=str(tmp_path / "again"), seed=7)
    other = prepare(again, RunDirectory(again.output_dir)).state
    report = take_foreign(tmp_path / "run", other, weights_only=True)
    assert_taken(other, load_model(tmp_path / "run").model)
    assert report.path == tmp_path / "run" / "best" and not report.notes
    with pytest.raises(UserError, match="no weights with names of this model"):
        take_foreign(tmp_path / "run", state, weights_only=True)


@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_a_converted_checkpoint_restores_every_bit(settings: Settings, tmp_path: Path, suffix: str) -> None:
    config = settings(4)
    train(config)
    folder = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    path = convert_checkpoint(folder, tmp_path / f"whole.{suffix}").path
    states = []
    for number, source in enumerate((folder, path)):
        again = settings(4, output_dir=str(tmp_path / f"again{number}"))
        state = prepare(again, RunDirectory(again.output_dir)).state
        checkpoint = open_any(source)
        assert checkpoint is not None and checkpoint.step == 4
        state.restore(checkpoint)  # type: ignore[arg-type]
        states.append(state.snapshot())
    ours, theirs = states
    assert ours.trainer["identity"].pop("run_id") != theirs.trainer["identity"].pop("run_id")
    assert ours.trainer == theirs.trainer | {"config": ours.trainer["config"]}
    for part in ("model", "optimizer", "rng"):
        a, b = getattr(ours, part), getattr(theirs, part)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert {name.split("/", 1)[1] for name in ours.optimizer} == set(ours.model)


def test_what_is_not_whole_is_not_opened_as_whole(settings: Settings, tmp_path: Path) -> None:
    train(settings(2))
    folder = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert open_any(tmp_path / "run" / "best") is None
    light = convert_checkpoint(folder, tmp_path / "light.json", weights_only=True)
    assert open_any(light.path) is None and light.left_out
    torch.save({"a.b": torch.ones(2)}, tmp_path / "x.pt")
    assert open_any(tmp_path / "x.pt") is None
    with pytest.raises(UserError, match="does not exist"):
        open_any(tmp_path / "nothing.json")


def test_a_checkpoint_of_hugging_faces_trainer_with_its_moments(settings: Settings, tmp_path: Path) -> None:
    """Twelve layers: safetensors sorts h.10 before h.2, and all of them have the same shapes."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    state = fresh(settings, num_hidden_layers=12, max_steps=60)
    torch.manual_seed(4)
    model = GPT2LMHeadModel(state.model.config)
    rows = [{"input_ids": torch.arange(16) + n, "labels": torch.arange(16) + n} for n in range(24)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"),
        max_steps=3,
        save_steps=3,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    report = take_foreign(tmp_path / "hf" / "checkpoint-3", state)
    assert_taken(state, model)
    named = dict(model.named_parameters())
    assert (report.step, report.moments, report.weights) == (3, len(named), len(named))
    by_parameter = trainer.optimizer.optimizer.state
    assert len(by_parameter) == len(named)
    for name, parameter in state.model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state.optimizer.state[parameter][key], by_parameter[named[name]][key]), name
    # With --init-from the same folder gives its weights alone.
    other = fresh(settings, num_hidden_layers=12, output_dir=str(tmp_path / "other"))
    report = take_foreign(tmp_path / "hf" / "checkpoint-3", other, weights_only=True)
    assert (report.step, report.moments, other.optimizer.state) == (None, 0, {})


def test_the_same_folder_made_by_hand(settings: Settings, tmp_path: Path) -> None:
    """As above where accelerate is not installed: sorted safetensors, decay and no-decay groups, the step in JSON."""
    state = fresh(settings, num_hidden_layers=12, max_steps=60)
    model = GPT2LMHeadModel(state.model.config)
    named = dict(model.named_parameters())
    groups = [[p for p in named.values() if p.dim() >= 2], [p for p in named.values() if p.dim() < 2]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=3e-3)
    for n in range(3):
        one_step(model, optimizer, torch.arange(64).reshape(2, 32) + n)
    model.save_pretrained(tmp_path / "checkpoint-3")
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint-3" / "optimizer.pt")
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3, "best_metric": NaN}')
    report = take_foreign(tmp_path / "checkpoint-3", state)
    assert (report.step, report.moments) == (3, len(named))
    for name, parameter in state.model.named_parameters():
        theirs = optimizer.state[named[name]]["exp_avg"]
        assert torch.equal(state.optimizer.state[parameter]["exp_avg"], theirs), name


def test_names_sorted_by_a_writer_of_json_do_not_mix_up_the_moments(
    script: PlainScript, settings: Settings, tmp_path: Path
) -> None:
    script.train(3)
    torch.save(script.checkpoint(), tmp_path / "x.pt")
    tree = json.loads(convert_checkpoint(tmp_path / "x.pt", tmp_path / "x.json").path.read_text())
    plain = {
        "model_state_dict": {
            name: tensor for name, tensor in tree["model_state_dict"].items() if name != "lm_head.weight"
        },
        "optimizer_state_dict": {
            "state": dict(tree["optimizer_state_dict"]["state"]["__dict__"]),
            "param_groups": [{"params": list(range(len(list(script.model.parameters()))))}],
        },
    }
    (tmp_path / "sorted.json").write_text(json.dumps(plain, sort_keys=True))
    state = fresh(settings, max_steps=60)
    named = dict(script.model.named_parameters())
    assert take_foreign(tmp_path / "sorted.json", state).moments == len(named)
    for name, parameter in state.model.named_parameters():
        theirs = script.optimizer.state[named[name]]["exp_avg"]
        assert torch.equal(state.optimizer.state[parameter]["exp_avg"], theirs), name
