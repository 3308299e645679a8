"""From settings to a state ready for its next step: fresh, or the newest checkpoint put back.

Reads the token shards and the run directory, builds model, optimizer and mixture, and says in one line what it
found: a fresh start, or the step it goes on from, which settings changed, and whether the run will be bit-identical.
"""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ekiden.checkpoint.mirror import Mirror
from ekiden.checkpoint.store import CheckpointStore
from ekiden.config import TrainConfig, field_types
from ekiden.config_checks import AUTO
from ekiden.errors import UserError
from ekiden.modeling.associations import Associations
from ekiden.modeling.attention import attention_name
from ekiden.modeling.build import build_model, head_weight, parameter_counts
from ekiden.modeling.device import (
    Precision,
    available_cores,
    configure_determinism,
    select_device,
    select_precision,
)
from ekiden.modeling.host_memory import keep_freed_memory
from ekiden.modeling.prepare import prepare_model
from ekiden.progress import human_count, say
from ekiden.tokenizer.load import Tokenizer
from ekiden.tokens.batches import Batches
from ekiden.tokens.cooccurrence import count_associations
from ekiden.tokens.format import TokenDataset
from ekiden.tokens.shares import final_shares
from ekiden.tokens.unigram import unigram_probabilities
from ekiden.training.converted import restore_any
from ekiden.training.exact import check_tree
from ekiden.training.facts import environment, memory_savers, session_facts, sums_of
from ekiden.training.finding import Found, find_files
from ekiden.training.foreign import take_foreign
from ekiden.training.microbatch import rows_each
from ekiden.training.optimizer import build_optimizer, learning_rate
from ekiden.training.order import order_of_samples, steps_of_epochs
from ekiden.training.ranks import Ranks
from ekiden.training.recipe import describe_recipe
from ekiden.training.rundir import RunDirectory
from ekiden.training.sharding import shard_state, wants_shards
from ekiden.training.state import Counters, SavedState, TrainingState, as_it_began, changed_settings


@dataclass
class Start:
    """Everything the loop needs.

    mirror: where checkpoints are copied to, or None. max_steps: optimizer steps of the whole run. resumed_from: the
    checkpoint, or None for a fresh start; resumed_step: its step. notes: what the start's event records. The main rank
    alone has store, mirror and checkpoint, and writes; all know the step.
    """

    state: TrainingState
    dataset: TokenDataset
    tokenizer: Tokenizer
    batches: Batches
    store: CheckpointStore | None
    mirror: Mirror | None
    device: torch.device
    precision: Precision
    max_steps: int
    resumed_from: SavedState | None
    resumed_step: int | None
    notes: dict[str, Any]


def prepare(config: TrainConfig, run: RunDirectory, ranks: Ranks | None = None) -> Start:
    """Return the run at its next step.

    Raises:
        UserError: missing or changed data, a setting that may not change, no good checkpoint among damaged ones.
    """
    ranks = ranks or Ranks()
    threads = configure_determinism(config.num_threads or max(1, available_cores() // ranks.local_world))
    device = rank_device(config.device, ranks)
    if device.type == "cpu":
        keep_freed_memory()
    precision = select_precision(device, config.precision)
    dataset = TokenDataset.open(config.dataset_path)
    tokenizer = dataset.tokenizer()
    identity = {"data": dataset.fingerprint, "tokenizer": dataset.tokenizer_sha256}
    found, resumed_step, saved = look(config, run, identity, ranks)
    if saved:
        config = as_it_began(config, saved["config"])
    changed = changed_settings(saved["config"], config) if saved else {}
    mixture, global_batch = order_of_samples(config, dataset, saved, ranks)
    unigrams = associations = None
    if saved is None and config.initialization in ("unigram", "cooccurrence"):
        unigrams = unigram_probabilities(dataset, mixture)
    if saved is None and config.initialization == "cooccurrence":
        associations = count_associations(dataset, mixture)
    model, sharded, compiled = place_model(
        config, tokenizer, device, precision, ranks, unigrams, associations
    )
    identity["run_id"] = ranks.from_main(
        (saved["identity"].get("run_id") if saved else None) or uuid.uuid4().hex
    )
    facts = environment(device, precision, threads, compiled) | {"attention": attention_name(model)}
    facts |= sums_of(config, ranks, sharded) | memory_savers(config)
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type) if precision.use_scaler else None
    state = TrainingState(config, model, optimizer, scaler, mixture, {**identity, "environment": facts})
    take_up(state, found, saved, changed, global_batch, ranks)
    max_steps = last_step(state, saved, dataset)
    taken = None if saved else ranks.on_main(lambda: take_weights(config, state, max_steps))
    lower_microbatch(state.counters, run, ranks)
    if config.elastic_exact:
        check_tree(global_batch, state.counters.microbatch, ranks.world)
    state.share(ranks, moments=not sharded)
    if sharded:
        shard_state(state, ranks, device, precision)
    notes = describe(state, max_steps, saved, changed) | ({"taken": taken} if taken else {})
    return Start(
        state=state,
        dataset=dataset,
        tokenizer=tokenizer,
        batches=Batches(dataset, state.mixture, global_batch),
        store=found.store,
        mirror=found.mirror,
        device=device,
        precision=precision,
        max_steps=max_steps,
        resumed_from=found.checkpoint,
        resumed_step=resumed_step,
        notes=notes | session_facts(state, device, precision),
    )


def look(
    config: TrainConfig, run: RunDirectory, identity: dict[str, Any], ranks: Ranks
) -> tuple[Found, int | None, dict[str, Any] | None]:
    """Return what the main rank finds to go on from, and on every rank its step and its `trainer_state.json`."""
    found = Found(None, None, None)

    def find() -> Any:
        nonlocal found
        found = find_files(config, run, identity)
        checkpoint = found.checkpoint
        return [checkpoint.step, checkpoint.json("trainer_state.json")] if checkpoint else [None, None]

    resumed_step, saved = ranks.on_main(find)
    return found, resumed_step, saved


def take_up(
    state: TrainingState,
    found: Found,
    saved: dict[str, Any] | None,
    changed: dict[str, tuple[Any, Any]],
    global_batch: int,
    ranks: Ranks,
) -> None:
    """Put the checkpoint back that was found, on the main rank, and its counters on all; or let the run begin at step 0."""
    batch_size = state.config.batch_size
    if saved is None:
        state.counters.global_batch = global_batch
        state.counters.microbatch_schedule = [[0, batch_size or rows_each(global_batch, ranks.world)]]
        return
    if found.checkpoint:
        restore_any(state, found.checkpoint)
    state.counters = Counters(**saved["counters"])
    if "batch_size" in changed:
        counters = state.counters
        counters.microbatch_schedule.append([counters.step, batch_size or counters.microbatch])


def lower_microbatch(counters: Counters, run: RunDirectory, ranks: Ranks) -> None:
    """Take the microbatch that a rank without memory left word of, perhaps on a disk of its own."""
    most = -ranks.agree([-(run.read_microbatch() or math.inf)])[0]
    if most < counters.microbatch:
        counters.microbatch_schedule.append([counters.step, int(most)])


def place_model(
    config: TrainConfig,
    tokenizer: Tokenizer,
    device: torch.device,
    precision: Precision,
    ranks: Ranks,
    unigrams: np.ndarray | None,
    associations: Associations | None,
) -> tuple[PreTrainedModel, bool, bool]:
    """Return a new model, whether its state is to be sharded (it is on the CPU then), and whether it is compiled.

    Raises:
        UserError: settings that a sharded model cannot have.
    """
    model = build_model(
        config,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        seed=config.seed,
        unigrams=unigrams,
        associations=associations,
    )
    if associations is not None:  # their eigenvectors' last bits depend on the CPU
        ranks.copy_from_main(head_weight(model).detach())
    sharded = wants_shards(config, ranks, sum(p.numel() for p in model.parameters()), device)
    if sharded and config.batch_size == AUTO:
        raise UserError(
            "--batch-size auto cannot try what fits with --parallel fsdp, where a rank that fails leaves the others waiting; "
            "give a number (`ekiden plan` says which fits)"
        )
    if not sharded:
        model.to(device)  # type: ignore[arg-type]
    return model, sharded, prepare_model(model, config, device, precision, sharded)


def last_step(state: TrainingState, saved: dict[str, Any] | None, dataset: TokenDataset) -> int:
    """Return the run's number of steps; begin the decay that `--decay-from` asks for, which has its own."""
    config, counters = state.config, state.counters
    if config.decay_from and saved and not counters.decay:
        begin_decay(state, saved["config"], dataset)
    if counters.decay:
        return int(counters.decay[0] + counters.decay[1])
    return config.max_steps or steps_of_epochs(config, dataset, counters.global_batch)


def begin_decay(state: TrainingState, source: dict[str, Any], dataset: TokenDataset) -> None:
    """Let the learning rate fall from where it is to the end, and the languages' shares end as the settings say.

    Args:
        source: settings of the run that is taken up.
    """
    config, counters = state.config, state.counters
    then = TrainConfig(**{name: value for name, value in source.items() if name in field_types()})
    planned = then.max_steps or steps_of_epochs(then, dataset, counters.global_batch)
    rate = learning_rate(counters.step, then, planned)
    steps = config.decay_steps or max(1, counters.step // 4)
    counters.decay = [counters.step, steps, rate]
    shares_change = config.final_language_weights or not config.language_weights
    if config.final_share and shares_change and len(state.mixture.languages) > 1:
        first = counters.data_step(counters.step) * counters.global_batch
        total = first + steps * counters.global_batch
        shares = final_shares(
            state.mixture,
            config.final_temperature,
            first,
            total,
            config.max_epochs_per_language or None,
            config.small_language_share,
            config.final_language_weights or None,
        )
        state.mixture = state.mixture.ending_with(shares, first)
    say(f"decaying over {steps} steps from step {counters.step}, from a learning rate of {rate:g}")


def rank_device(requested: str, ranks: Ranks) -> torch.device:
    """Return this rank's device: where there are several ranks, each takes the GPU of its number on the machine.

    Raises:
        UserError: it is not there; or one device is asked for by all.
    """
    if ranks.world == 1:
        device = select_device(requested)
        seen = torch.cuda.device_count() if device.type == "cuda" and requested == "auto" else 1
        if seen > 1:
            say(f"1 of {seen} GPUs is used; --devices {seen} trains on all of them")
        return device
    if requested.startswith("cuda:"):
        raise UserError(
            f"--device {requested} is one device for {ranks.world} ranks; give cuda, or start one process"
        )
    gpu = requested == "cuda" or (requested == "auto" and torch.cuda.is_available())
    return select_device(f"cuda:{ranks.local_rank}" if gpu else "cpu")


def take_weights(config: TrainConfig, state: TrainingState, max_steps: int) -> str | None:
    """Put what fits of `--init-from`, or of a `--resume-from` that is no whole checkpoint, into a fresh state.

    Returns:
        What was taken and what was not, in a sentence; None where nothing is asked for.

    Raises:
        UserError: it does not hold this model's weights.
    """
    given = config.init_from or config.resume_from
    if given == "auto":
        return None
    report = take_foreign(given, state, weights_only=bool(config.init_from), max_steps=max_steps)
    say(report.sentence())
    return report.sentence()


def describe(
    state: TrainingState, max_steps: int, saved: dict[str, Any] | None, changed: dict[str, tuple[Any, Any]]
) -> dict[str, Any]:
    """Say what starts or goes on, and return the same as the event's details."""
    counters, config = state.counters, state.config
    blocks, embedding = parameter_counts(state.model)
    now = state.identity["environment"]
    notes: dict[str, Any] = {"environment": now, "pid": os.getpid(), "max_steps": max_steps}
    say(
        f"{config.preset}: {human_count(blocks)} parameters in blocks + {human_count(embedding)} in the embedding; "
        f"{now['device']}, {now['precision']}, {now['attention']} attention; "
        f"{max_steps} steps of {counters.global_batch} x {config.max_length} tokens"
    )
    if saved is None:
        say("\n".join(describe_recipe(config, len(state.mixture.languages))))
        say(state.mixture.describe(max_steps * counters.global_batch * config.max_length))
        return notes
    for name, (before, after) in changed.items():
        was, now_is = (value if value not in ("", [], {}) else "not set" for value in (before, after))
        say(f"changed setting: {name} was {was}, is {now_is}")
    then = saved["identity"]["environment"]
    differing = [
        f"{key} was {then.get(key)}, is {now.get(key)}" for key in now | then if then.get(key) != now.get(key)
    ]
    if "batch_size" in changed:
        before, after = (size or "auto" for size in changed["batch_size"])
        differing.append(f"microbatch was {before}, is {after}")
    if differing:
        say(
            f"resuming at step {counters.step}: same data order; sums may differ in the last bits ({'; '.join(differing)})"
        )
    else:
        say(f"resuming at step {counters.step}: same data order, bit-identical to an uninterrupted run")
    notes["changed"] = {name: list(values) for name, values in changed.items()}
    notes["level"] = "L3" if differing else "L1"
    notes["differing"] = differing
    return notes
