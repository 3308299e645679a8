"""Which checkpoint a run goes on from: its own newest, its mirror's, or the one that it was told to begin with.

Reads the run directory, the mirror and what `--init-from`, `--decay-from` and `--resume-from` name; gives
`training.start` a verified checkpoint, or None for a fresh start. The main rank alone comes here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ekiden.checkpoint.mirror import Mirror, open_mirror, restore_from_mirror
from ekiden.checkpoint.store import Checkpoint, CheckpointStore, recover_folder
from ekiden.config import TrainConfig
from ekiden.errors import UserError
from ekiden.progress import say
from ekiden.training.converted import open_any
from ekiden.training.rundir import RunDirectory, default_checkpoint_budget
from ekiden.training.state import SavedState
from ekiden.values import parse_bytes


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
