"""The order of a run's samples: which mixture and global batch it keeps for ever, and that data and settings still make them.

`training.start` asks here once a start, with what the newest checkpoint says, if there is one. What is decided at a run's
beginning stands in every checkpoint; a later start takes it from there and refuses whatever would give another order.
"""

from __future__ import annotations

import math
from typing import Any

from ekiden.config import TrainConfig
from ekiden.errors import UserError
from ekiden.progress import say
from ekiden.tokens.format import TokenDataset
from ekiden.tokens.mixture import Mixture
from ekiden.tokens.shares import plan_mixture
from ekiden.training.ranks import Ranks


def order_of_samples(
    config: TrainConfig, dataset: TokenDataset, saved: dict[str, Any] | None, ranks: Ranks
) -> tuple[Mixture, int]:
    """Return the mixture and the global batch: the run's own, or a new run's, which it keeps for ever.

    Raises:
        UserError: they are not what the run began with; or there are more ranks than samples.
    """
    if saved:
        check_data(saved["identity"], dataset, config)
        mixture = Mixture.from_dict(saved["mixture"])
        global_batch = check_global_batch(
            saved["counters"]["global_batch"], saved["config"], config, ranks.world
        )
    else:
        global_batch = config.samples_per_step(ranks.world)
        mixture = fresh_mixture(config, dataset, global_batch)
    if global_batch < ranks.world:
        raise UserError(
            f"a global batch of {global_batch} samples cannot be divided among {ranks.world} ranks; start at most {global_batch}"
        )
    return mixture, global_batch


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
        small_share=config.small_language_share,
        final_weights=config.final_language_weights or None,
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


def check_global_batch(began_with: int, saved: dict[str, Any], config: TrainConfig, world: int) -> int:
    """Return the run's global batch after checking that the settings still make it, with as many ranks as it began with.

    How many train now does not matter: fewer of them accumulate more microbatches, and more of them fewer.

    Raises:
        UserError: they do not.
    """
    if config.global_batch_size or saved.get("global_batch_size"):
        now = config.samples_per_step(world)
        if now != began_with:
            raise UserError(
                f"a global batch of {now} samples is not the {began_with} this run began with; give --global-batch-size "
                f"{began_with}"
            )
        return now
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
