"""Ekiden's own trainer through `ekiden.training.loop.train`, two checkpoints kept, saved beside training (its default)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ekiden
from peers.systems import BATCH, HEADS, KEEP, LAYERS, LENGTH, WIDTH, System
from peers.trial import Session, digest


class Ekiden(System):
    """Its save is acknowledged when the store has returned, in the thread that saves."""

    name = "ekiden"
    title = "Ekiden"
    settings = "--save-steps 1 --max-checkpoints 2, otherwise its defaults"

    def load_libraries(self) -> None:
        """Import the trainer."""
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    def versions(self) -> dict[str, str]:
        """Return Ekiden's."""
        return {"ekiden": ekiden.__version__}

    def train(self, session: Session) -> None:
        """Run `ekiden train` with the three moments told: taken up, stepped, saved."""
        from ekiden.checkpoint.store import CheckpointStore
        from ekiden.config import build_config
        from ekiden.training import loop
        from ekiden.training.state import TrainingState

        def state(training: TrainingState) -> str:
            return digest(training.model.named_parameters(), training.optimizer)

        class Tells(loop.Trainer):
            def run_to_end(self) -> Any:
                session.resumed(self.counters.step, state(self.state))
                return super().run_to_end()

        snapshot, save = TrainingState.snapshot, CheckpointStore.save

        def telling_snapshot(self: TrainingState) -> Any:
            session.stepped(self.counters.step, state(self))
            return snapshot(self)

        def telling_save(self: CheckpointStore, step: int, *rest: Any, **more: Any) -> Any:
            checkpoint = save(self, step, *rest, **more)
            session.saved(step)
            return checkpoint

        loop.Trainer = Tells  # type: ignore[misc]
        TrainingState.snapshot, CheckpointStore.save = telling_snapshot, telling_save  # type: ignore[method-assign]
        config = build_config(
            "gpt2-10m",
            dataset_path=str(session.shards),
            output_dir=str(session.run),
            num_hidden_layers=LAYERS,
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=WIDTH // HEADS,
            intermediate_size=4 * WIDTH,
            max_length=LENGTH,
            batch_size=BATCH,
            max_steps=100_000,
            save_steps=session.every,
            max_checkpoints=KEEP,
            eval_steps=0,
            sample_steps=0,
            log_steps=1,
            num_threads=1,
        )
        loop.train(config)

    def newest_files(self, run: Path) -> dict[str, Path]:
        """Weights and optimizer are files of their own."""
        newest = max((run / "checkpoints").glob("step-*"))
        return {"weights": newest / "model.safetensors", "optimizer": newest / "optimizer.safetensors"}

    def repair(self, run: Path) -> None:
        """Remove the newest checkpoint, and those set aside."""
        for path in (run / "checkpoints").glob(".damaged-*"):
            shutil.rmtree(path)
        found = sorted((run / "checkpoints").glob("step-*"))
        if found:
            shutil.rmtree(found[-1])
