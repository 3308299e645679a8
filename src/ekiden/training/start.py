"""From settings to a state ready for its next step: fresh, or the newest checkpoint put back.

Reads the token shards and the run directory, builds model, optimizer and mixture, and says in one line what it
found: a fresh start, or the step it goes on from, which settings changed, and whether the run will be bit-identical.
"""

from __future__ import annotations

import math
import os
import platform
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import ekiden
from ekiden.checkpoint.mirror import Mirror, open_mirror, restore_from_mirror
from ekiden.checkpoint.store import Checkpoint, CheckpointStore, recover_folder
from ekiden.config import TrainConfig, field_types
from ekiden.errors import UserError
from ekiden.modeling.build import build_model, parameter_counts
from ekiden.modeling.device import (
    Precision,
    available_cores,
    configure_determinism,
    select_device,
    select_precision,
)
from ekiden.modeling.prepare import prepare_model
from ekiden.progress import human_count, say
from ekiden.tokenizer.load import Tokenizer
from ekiden.tokens.batches import Batches
from ekiden.tokens.format import TokenDataset
from ekiden.tokens.mixture import Mixture, final_shares, plan_mixture
from ekiden.training.converted import open_any, restore_any
from ekiden.training.exact import check_tree
from ekiden.training.facts import session_facts
from ekiden.training.foreign import take_foreign
from ekiden.training.optimizer import build_optimizer, learning_rate
from ekiden.training.ranks import Ranks
from ekiden.training.recipe import describe_recipe
from ekiden.training.rundir import RunDirectory, default_checkpoint_budget
from ekiden.training.sharding import shard_state, wants_shards
from ekiden.training.state import Counters, SavedState, TrainingState, changed_settings
from ekiden.values import parse_bytes


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
    precision = select_precision(device, config.precision)
    dataset = TokenDataset.open(config.dataset_path)
    tokenizer = dataset.tokenizer()
    identity = {"data": dataset.fingerprint, "tokenizer": dataset.tokenizer_sha256}
    found: list[Found] = []

    def look() -> Any:
        found.append(find_files(config, run, identity))
        checkpoint = found[0].checkpoint
        return [checkpoint.step, checkpoint.json("trainer_state.json")] if checkpoint else [None, None]

    resumed_step, saved = ranks.on_main(look)
    store, mirror, checkpoint = found[0] if found else Found(None, None, None)
    global_batch = config.batch_size * config.gradient_accumulation_steps * ranks.world
    changed: dict[str, tuple[Any, Any]] = {}
    if saved:
        changed = changed_settings(saved["config"], config)
        check_data(saved["identity"], dataset, config)
        mixture = Mixture.from_dict(saved["mixture"])
        global_batch = check_global_batch(saved["counters"]["global_batch"], saved["config"], config)
    else:
        mixture = fresh_mixture(config, dataset, global_batch)
    if global_batch < ranks.world:
        raise UserError(
            f"a global batch of {global_batch} samples cannot be divided among {ranks.world} ranks; start at most {global_batch}"
        )
    model = build_model(
        config,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        seed=config.seed,
    )
    sharded = wants_shards(config, ranks, sum(p.numel() for p in model.parameters()), device)
    if not sharded:
        model.to(device)  # type: ignore[arg-type]
    compiled = prepare_model(model, config, device, precision, sharded)
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type) if precision.use_scaler else None
    identity["run_id"] = ranks.from_main(
        (saved["identity"].get("run_id") if saved else None) or uuid.uuid4().hex
    )
    facts = {
        **identity,
        "environment": environment(device, precision, threads, compiled)
        | sums_of(config, ranks, sharded)
        | memory_savers(config),
    }
    state = TrainingState(config, model, optimizer, scaler, mixture, facts)
    if saved:
        if checkpoint:
            restore_any(state, checkpoint)
        state.counters = Counters(**saved["counters"])
        if "batch_size" in changed:
            state.counters.microbatch_schedule.append([state.counters.step, config.batch_size])
    else:
        state.counters.global_batch = global_batch
        state.counters.microbatch_schedule = [[0, config.batch_size]]
    max_steps = config.max_steps or steps_of_epochs(config, dataset, global_batch)
    if config.decay_from and saved and not state.counters.decay:
        begin_decay(state, saved["config"], dataset)
    if state.counters.decay:
        max_steps = int(state.counters.decay[0] + state.counters.decay[1])
    taken = None if saved else ranks.on_main(lambda: take_weights(config, state, max_steps))
    limit = ranks.on_main(run.read_microbatch)
    if limit and limit < state.counters.microbatch:
        state.counters.microbatch_schedule.append([state.counters.step, limit])
    if config.elastic_exact:
        check_tree(global_batch, state.counters.microbatch, ranks.world)
    state.share(ranks, moments=not sharded)
    if sharded:
        shard_state(state, ranks, device, precision)
    notes = describe(state, max_steps, saved, changed) | ({"taken": taken} if taken else {})
    notes |= session_facts(state, device, precision)
    batches = Batches(dataset, state.mixture, global_batch)
    return Start(
        state,
        dataset,
        tokenizer,
        batches,
        store,
        mirror,
        device,
        precision,
        max_steps,
        checkpoint,
        resumed_step,
        notes,
    )


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
    if config.final_share and not config.language_weights and len(state.mixture.languages) > 1:
        first = counters.data_step(counters.step) * counters.global_batch
        total = first + steps * counters.global_batch
        shares = final_shares(
            state.mixture, config.final_temperature, first, total, config.max_epochs_per_language or None
        )
        state.mixture = state.mixture.ending_with(shares, first)
    say(f"decaying over {steps} steps from step {counters.step}, from a learning rate of {rate:g}")


class Found(NamedTuple):
    """What the main rank opens: the run's store, its mirror where it has one, the checkpoint to go on from."""

    store: CheckpointStore | None
    mirror: Mirror | None
    checkpoint: SavedState | None


def find_files(config: TrainConfig, run: RunDirectory, identity: dict[str, Any]) -> Found:
    """Return what lies in the run directory and the mirror, with what a killed session left mended.

    Raises:
        UserError: as `newest_own` and `find_checkpoint`.
    """
    for folder in (run.best, run.final_model):
        recover_folder(folder)
    budget = parse_bytes(config.checkpoint_budget, "--checkpoint-budget")
    if budget is None:
        budget = default_checkpoint_budget(run.checkpoints)
    store = CheckpointStore(run.checkpoints, config.max_checkpoints, budget)
    mirror = open_mirror(config.mirror) if config.mirror else None
    return Found(store, mirror, find_checkpoint(config, newest_own(store, run, mirror, identity)))


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


def newest_own(
    store: CheckpointStore, run: RunDirectory, mirror: Mirror | None, identity: dict[str, Any]
) -> Checkpoint | None:
    """Return the newest good checkpoint of this run, fetched first where the mirror has a newer one.

    Raises:
        UserError: some exist and none is good, here or there; or the mirror holds another run, or is needed and cannot
            be read.
    """
    if mirror is None:
        return store.newest()
    own, problem = None, None
    try:
        own = store.newest()
    except UserError as error:
        problem = error
    known = {**(own.manifest.run if own else {}), **identity}
    if restore_from_mirror(mirror, store.folder, run.path, own.step if own else None, known):
        return store.newest()
    if problem:
        raise problem
    return own


def find_checkpoint(config: TrainConfig, own: Checkpoint | None) -> SavedState | None:
    """Return the checkpoint to go on from: the newest good one of this run, else the one asked for, else None.

    A run that began with `--resume-from` or `--init-from` goes on from its own checkpoints when the same command is
    given again. None also where only the weights of what is asked for can be taken (`take_weights`).

    Raises:
        UserError: the one asked for is missing or damaged; or some exist and none is good.
    """
    given = config.init_from or config.decay_from or config.resume_from
    if given == "auto":
        return own
    path = Path(given)
    settings = own.json("trainer_state.json")["config"] if own else {}
    began_with_it = given in [settings.get(name) for name in ("init_from", "decay_from", "resume_from")]
    if not path.exists() and not began_with_it:
        flag = "--init-from" if config.init_from else "--decay-from" if config.decay_from else "--resume-from"
        raise UserError(f"{flag} {path} does not exist; give a run, a checkpoint, a folder, a .pt or a .json")
    asked = open_any(path) if path.exists() and not config.init_from else None
    if config.decay_from and asked is None and own is None:
        raise UserError(
            f"--decay-from {path} holds no whole checkpoint of a run; give a run or a checkpoint folder"
        )
    if asked is not None and (own is None or own.step < asked.step):
        return asked
    if own is not None and (asked is None or own.path.resolve() != asked.path.resolve()):
        say(
            f"going on from {own.path.name} of this run; give another --output-dir to begin with {path} again"
        )
    return own


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


def fresh_mixture(config: TrainConfig, dataset: TokenDataset, global_batch: int) -> Mixture:
    """Return the mixture that a new run keeps for ever."""
    tokens = {name: dataset.split(name, "train").tokens for name in dataset.languages}
    empty = [name for name, count in tokens.items() if count == 0]
    for name in empty:
        say(f"{name} has no training tokens and is left out")
    tokens = {name: count for name, count in tokens.items() if count > 0}
    if not tokens:
        raise UserError(
            f"--dataset-path {config.dataset_path} holds no training tokens; preprocess a larger corpus"
        )
    steps = config.max_steps or steps_of_epochs(config, dataset, global_batch)
    return plan_mixture(
        tokens,
        config.max_length,
        config.seed,
        temperature=config.temperature,
        weights=config.language_weights or None,
        max_epochs=config.max_epochs_per_language or None,
        total_samples=steps * global_batch,
        final_temperature=config.final_temperature,
        final_share=config.final_share,
    )


def steps_of_epochs(config: TrainConfig, dataset: TokenDataset, global_batch: int) -> int:
    """Return the steps in which `epochs` times as many tokens are seen as the training split holds."""
    tokens = sum(dataset.split(name, "train").tokens for name in dataset.languages)
    return max(1, math.ceil(config.epochs * tokens / (global_batch * config.max_length)))


def check_data(identity: dict[str, Any], dataset: TokenDataset, config: TrainConfig) -> None:
    """Refuse data that is not the data the run began with.

    Raises:
        UserError: the tokenizer or the shards differ.
    """
    for key, now, what in (
        ("tokenizer", dataset.tokenizer_sha256, "tokenizer"),
        ("data", dataset.fingerprint, "token shards"),
    ):
        if identity[key] != now:
            raise UserError(
                f"--dataset-path {config.dataset_path}: its {what} differ from what this run began with "
                f"({identity[key][:12]} then, {now[:12]} now); give the same data, or another --output-dir for a new run"
            )


def check_global_batch(began_with: int, saved: dict[str, Any], config: TrainConfig) -> int:
    """Return the run's global batch after checking that the settings still make it, with as many ranks as it began with.

    How many train now does not matter: fewer of them accumulate more microbatches, and more of them fewer.

    Raises:
        UserError: they do not.
    """
    ranks_then = began_with // (saved["batch_size"] * saved["gradient_accumulation_steps"])
    now = config.batch_size * config.gradient_accumulation_steps * ranks_then
    if now != began_with:
        ranks = f" x {ranks_then} ranks it began with" if ranks_then > 1 else ""
        raise UserError(
            f"--batch-size {config.batch_size} x --gradient-accumulation-steps {config.gradient_accumulation_steps}{ranks} "
            f"is a global batch of {now} samples, but this run began with {began_with}; give values whose product is "
            f"{began_with // ranks_then}"
        )
    return now


def environment(device: torch.device, precision: Precision, threads: int, compiled: bool) -> dict[str, Any]:
    """Return what has to be equal for a resumed run to be bit-identical (on a CPU the thread count orders the sums)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    facts = {
        "device": name,
        "precision": precision.name,
        "compiled": compiled,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "ekiden": ekiden.__version__,
    }
    return facts | ({"threads": threads} if device.type == "cpu" else {})


def sums_of(config: TrainConfig, ranks: Ranks, sharded: bool) -> dict[str, Any]:
    """Return what decides the order in which gradients are summed over ranks; with `--elastic-exact` nothing does."""
    if config.elastic_exact:
        return {"sums": "tree"}
    return {"ranks": ranks.world, "parallel": "fsdp" if sharded else "ddp"} if ranks.world > 1 else {}


def memory_savers(config: TrainConfig) -> dict[str, bool]:
    """Return the settings that may change on resume and compute some sums elsewhere or again."""
    savers = {
        "activation_checkpointing": config.activation_checkpointing,
        "cpu_offload": config.cpu_offload,
    }
    return {name: True for name, on in savers.items() if on}


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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
        f"{now['device']}, {now['precision']}; {max_steps} steps of {counters.global_batch} x {config.max_length} tokens"
    )
    if saved is None:
        say("\n".join(describe_recipe(config)))
        say(state.mixture.describe(max_steps * counters.global_batch * config.max_length))
        return notes
    for name, (before, after) in changed.items():
        say(f"changed setting: {name} was {before}, is {after}")
    then = saved["identity"]["environment"]
    differing = [
        f"{key} was {then.get(key)}, is {now.get(key)}" for key in now | then if then.get(key) != now.get(key)
    ]
    if "batch_size" in changed:
        differing.append(f"microbatch was {changed['batch_size'][0]}, is {changed['batch_size'][1]}")
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
