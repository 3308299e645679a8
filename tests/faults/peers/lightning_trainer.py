"""Lightning's `Trainer` with `ModelCheckpoint(save_last=True)` and `ckpt_path="last"`, two further checkpoints kept."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from peers.systems import BATCH, KEEP, System, build_model, samples
from peers.trial import Session, digest


class Lightning(System):
    """Its save writes a temporary file in TMPDIR and moves it: atomic where both are on one file system."""

    name = "lightning"
    title = "Lightning, TMPDIR on the same file system"
    settings = 'ModelCheckpoint(save_last=True, save_top_k=2, monitor="step"), fit(ckpt_path="last")'

    def load_libraries(self) -> None:
        """Import the trainer."""
        import lightning.pytorch  # noqa: F401
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    def versions(self) -> dict[str, str]:
        """Return the trainer's."""
        return {"lightning": importlib.metadata.version("lightning")}

    def train(self, session: Session) -> None:
        """Train with a checkpoint callback that tells."""
        import lightning.pytorch as pl
        from lightning.pytorch.callbacks import ModelCheckpoint

        self.choose_tmpdir(session.run)
        model = build_model()

        class Module(pl.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
                return self.model(input_ids=batch[0], labels=batch[0]).loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def state(trainer: Any) -> str:
            return digest(model.named_parameters(), trainer.optimizers[0])

        class Tells(ModelCheckpoint):  # type: ignore[misc]
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                super().on_train_start(trainer, pl_module)
                session.resumed(trainer.global_step, state(trainer))

            def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
                due = trainer.global_step % session.every == 0
                if due:
                    session.stepped(trainer.global_step, state(trainer))
                super().on_train_batch_end(trainer, *rest)
                if due:
                    session.saved(trainer.global_step)

        pl.seed_everything(0, verbose=False)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(samples()), batch_size=BATCH, shuffle=True
        )
        checkpoint = Tells(
            dirpath=str(session.run),
            every_n_train_steps=session.every,
            save_top_k=KEEP,
            monitor="step",
            mode="max",
            save_last=True,
        )
        trainer = pl.Trainer(
            max_steps=100_000,
            accelerator="cpu",
            devices=1,
            callbacks=[checkpoint],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), loader, ckpt_path="last")

    def choose_tmpdir(self, run: Path) -> None:
        """Put temporary files beside the run, on its file system."""
        folder = run / "tmp"
        folder.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(folder)
        tempfile.tempdir = None

    def newest_files(self, run: Path) -> dict[str, Path]:
        """One file holds both."""
        return {"both": run / "last.ckpt"}

    def repair(self, run: Path) -> None:
        """Take `last.ckpt` away, and give the newest of the others in its place."""
        for path in run.glob("last*.ckpt"):
            path.unlink()
        others = {
            int(found[1]): path
            for path in run.glob("*.ckpt")
            if (found := re.search(r"step=(\d+)", path.name))
        }
        if others:
            newest = others[max(others)]
            shutil.copy(newest, run / "last.ckpt")
            newest.unlink()


class LightningOtherTmpdir(Lightning):
    """The same with TMPDIR on another file system, as where /tmp is a disk or a memory of its own."""

    name = "lightning-other-tmp"
    title = "Lightning, TMPDIR on another file system"
    settings = Lightning.settings

    def __init__(self, other: str) -> None:
        super().__init__()
        self.other = other

    def choose_tmpdir(self, run: Path) -> None:
        """Put temporary files elsewhere."""
        assert Path(self.other).stat().st_dev != run.stat().st_dev, (
            "--other-tmp is on the run's own file system"
        )
        os.environ["TMPDIR"] = self.other
        tempfile.tempdir = None
