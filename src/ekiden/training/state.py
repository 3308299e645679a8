"""The one state object of a run: what a checkpoint holds, and nothing else decides how the run goes on.

`training.loop` changes it step by step; `snapshot` copies it at a step boundary so that it can be written beside
training; `restore` puts a verified checkpoint back into it, to the last bit.

Files of a checkpoint: `model.safetensors` with `config.json` and the tokenizer (so the folder is a Hugging Face
folder too), `optimizer.safetensors` (moments by parameter name), `rng.safetensors`, `trainer_state.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ekiden.checkpoint.store import CheckpointWriter
from ekiden.config import RESUME_FREE, TrainConfig
from ekiden.errors import UserError
from ekiden.tokens.mixture import Mixture
from ekiden.training.ranks import Ranks

TensorDict = dict[str, torch.Tensor]


class SavedState(Protocol):
    """A whole checkpoint of Ekiden's: a verified folder, or what was converted from one."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""

    def json(self, filename: str) -> Any:
        """Return the value of one of its JSON files."""

    def tensors(self, filename: str) -> TensorDict:
        """Return the tensors of one of its safetensors files."""


@dataclass
class Counters:
    """The numbers of a run's state; JSON in `trainer_state.json`.

    Attributes:
        step: optimizer steps done. tokens: training tokens seen. seconds: of training, over all sessions.
        global_batch: samples a step, fixed at the start for ever.
        microbatch_schedule: [from step, samples]: the microbatch, changed by running out of memory or by hand.
        best_loss: lowest macro evaluation loss, nats a token; None before the first evaluation.
        bad_in_row: steps just skipped in a row. skipped_steps: steps skipped in all. rollbacks: done so far.
        skipped_batches: [from step, global batches]: data left out after a roll-back.
        decay: [first step, steps, learning rate there] of a decay that `--decay-from` began; empty: none.
        save_seconds: longest time a save took; reserved before a deadline.
        wandb_run_id: the tracker's run, to be continued.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    global_batch: int = 0
    microbatch_schedule: list[list[int]] = field(default_factory=list)
    best_loss: float | None = None
    bad_in_row: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0
    skipped_batches: list[list[int]] = field(default_factory=list)
    decay: list[float] = field(default_factory=list)
    save_seconds: float = 0.0
    wandb_run_id: str | None = None

    @property
    def microbatch(self) -> int:
        """Samples a device takes at a time, now."""
        return self.microbatch_schedule[-1][1]

    def data_step(self, step: int) -> int:
        """Return the index of the global batch that `step` trains on: its own, plus the batches left out before it."""
        return step + sum(count for first, count in self.skipped_batches if step >= first)


@dataclass
class Snapshot:
    """A copy of the whole state in host memory, safe to write while training goes on."""

    step: int
    model: TensorDict
    optimizer: TensorDict
    rng: TensorDict
    trainer: dict[str, Any]

    def write(self, writer: CheckpointWriter) -> None:
        """Write the files of a checkpoint that change from save to save."""
        writer.tensors("model.safetensors", self.model, metadata={"format": "pt"})
        writer.tensors("optimizer.safetensors", self.optimizer)
        writer.tensors("rng.safetensors", self.rng)
        writer.json("trainer_state.json", self.trainer)


class TrainingState:
    """Model, optimizer, scaler and counters of a run, with the facts that identify it.

    Args:
        identity: JSON facts kept with every checkpoint: data and tokenizer fingerprints and the environment that
            decides whether results stay bit-identical (`training.facts.environment`).
    """

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        mixture: Mixture,
        identity: dict[str, Any],
    ) -> None:
        self.config, self.model, self.optimizer, self.scaler = config, model, optimizer, scaler
        self.mixture, self.identity = mixture, identity
        self.counters = Counters()
        # In shards (`training.sharding`), every rank has a part, and the main one alone keeps what is gathered.
        self.sharded, self.keeps = False, True

    def snapshot(self) -> Snapshot:
        """Return a copy of everything a checkpoint holds.

        Raises:
            FloatingPointError: a weight is not finite; such a state is never written.
        """
        model = self.weights()
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        trainer = {
            "counters": dataclasses.asdict(self.counters),
            "config": dataclasses.asdict(self.config),
            "mixture": self.mixture.as_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "identity": self.identity,
        }
        return Snapshot(self.counters.step, model, self._optimizer_tensors(), rng, trainer)

    def weights(self) -> TensorDict:
        """Return a copy of the model's parameters in host memory, by name.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        weights = {name: self._copy(p) for name, p in self.model.named_parameters()}
        for name, tensor in weights.items():
            if not torch.isfinite(tensor).all():
                raise FloatingPointError(f"{name} is not finite at step {self.counters.step}")
        return weights

    def _optimizer_tensors(self) -> TensorDict:
        tensors = {}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = self._copy(value)
        return tensors

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the whole of `tensor` in host memory; nothing on ranks that do not keep it."""
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        return whole.to("cpu", copy=True) if self.keeps else torch.empty(0)

    def restore(self, checkpoint: SavedState) -> None:
        """Put `checkpoint` into this state.

        Raises:
            UserError: its tensors are not this model's.
        """
        trainer = checkpoint.json("trainer_state.json")
        parameters = dict(self.model.named_parameters())
        load_weights(self.model, checkpoint.tensors("model.safetensors"), str(checkpoint.path))
        moments = checkpoint.tensors("optimizer.safetensors")
        self.optimizer.state.clear()
        for full_name, value in moments.items():
            key, name = full_name.split("/", 1)
            parameter = parameters[name]
            # AdamW's fused kernel keeps `step` on the parameter's device in fp32, like the moments.
            self.optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
        rng = checkpoint.tensors("rng.safetensors")
        torch.set_rng_state(rng["cpu"].clone())
        if torch.cuda.is_available() and f"cuda{torch.cuda.device_count() - 1}" in rng:
            torch.cuda.set_rng_state_all([rng[f"cuda{i}"].clone() for i in range(torch.cuda.device_count())])
        if self.scaler is not None and trainer["scaler"]:
            self.scaler.load_state_dict(trainer["scaler"])
        self.counters = Counters(**trainer["counters"])

    def share(self, ranks: Ranks, moments: bool = True) -> None:
        """Make this state the main rank's, on all: one rank reads a checkpoint, and no disk need be shared.

        Args:
            moments: the optimizer's too; without, they stay on the main rank, for `training.sharding` to divide.
        """
        if ranks.world == 1:
            return
        parameters = dict(self.model.named_parameters())
        for parameter in parameters.values():
            ranks.copy_from_main(parameter.data)
        facts = {
            "counters": dataclasses.asdict(self.counters),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "moments": {
                name: {
                    key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
                    for key, value in self.optimizer.state.get(parameter, {}).items()
                }
                for name, parameter in parameters.items()
                if moments
            },
        }
        facts = ranks.from_main(facts)
        for name, kinds in facts["moments"].items():
            held = self.optimizer.state[parameters[name]] if kinds else {}
            for key, (shape, dtype) in kinds.items():
                if not ranks.main:
                    held[key] = torch.empty(
                        shape, dtype=getattr(torch, dtype), device=parameters[name].device
                    )
                ranks.copy_from_main(held[key])
        if self.scaler is not None and facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        self.counters = Counters(**facts["counters"])


def load_weights(model: nn.Module, tensors: TensorDict, where: str) -> None:
    """Copy `tensors` into the parameters of the same names.

    Raises:
        UserError: a name is missing or left over, or a shape differs.
    """
    parameters = dict(model.named_parameters())
    for name in parameters.keys() ^ tensors.keys():
        raise UserError(
            f"{where} does not hold this model: {name} is only in {'the model' if name in parameters else 'the file'}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise UserError(
                    f"{where} does not hold this model: {name} is {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}"
                )
            parameter.copy_(tensors[name])


SINCE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "muon_even": lambda saved: False,
    "muon_first_beta1": lambda saved: saved["beta1"],
    "small_language_share": lambda saved: 0.0,
    "local_heads": lambda saved: False,
}
"""What a run did before a setting existed, where its default does something else."""
OTHER_DEFAULT = {
    "temperature": "small_language_share",
    "final_temperature": "small_language_share",
    "initialization": "muon_even",
    "beta2": "muon_even",
    "learning_rate": "local_heads",
}
"""Settings whose default changed when another setting came."""
BEGINNING = ("initialization", "small_language_share", "local_heads")
"""Settings that are used where a run begins: weights and order of the data are in the checkpoint. Their defaults have changed."""


def settings_then(saved: dict[str, Any]) -> dict[str, Any]:
    """Return all settings that a checkpoint's run had, also those that came after it."""
    since = {name: value(saved) for name, value in SINCE.items() if name not in saved and "beta1" in saved}
    return {**dataclasses.asdict(TrainConfig()), **since, **saved}


def as_it_began(config: TrainConfig, saved: dict[str, Any]) -> TrainConfig:
    """Return `config`, but a setting whose default came after the run began, and was not given, as the run has it.

    So what was over before the first step, whenever its default changed.
    """
    then, default = settings_then(saved), TrainConfig()
    later = {name: name for name in SINCE} | OTHER_DEFAULT
    return dataclasses.replace(
        config,
        **{
            name: then[name]
            for name, came_with in later.items()
            if (came_with not in saved or name in BEGINNING)
            and getattr(config, name) == getattr(default, name)
        },
    )


def changed_settings(saved: dict[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return {name: (saved, now)} for every setting that differs from the checkpoint's.

    A setting that the checkpoint does not know, being older than it, was at its default then, or as `SINCE` says.

    Raises:
        UserError: one of them would make it another run.
    """
    now, then = dataclasses.asdict(config), settings_then(saved)
    changed = {name: (then[name], value) for name, value in now.items() if then[name] != value}
    for name, (before, after) in changed.items():
        if name not in RESUME_FREE:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {after} differs from the {before} this run began with; give {flag} {before}, or another "
                f"--output-dir{' and --mirror' if config.mirror else ''} for a new run"
            )
    return changed
