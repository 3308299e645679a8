"""Hugging Face `Trainer` with `resume_from_checkpoint`, saving weights as safetensors, two checkpoints kept."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

from peers.systems import BATCH, KEEP, System, build_model, newest_folder, samples
from peers.trial import Session, digest


class HuggingFace(System):
    """The command is what its examples do: `trainer.train(resume_from_checkpoint=get_last_checkpoint(output_dir))`,
    which is `resume_from_checkpoint=True` except that an empty folder is a fresh start."""

    name = "hf-trainer"
    title = "Hugging Face Trainer"
    settings = "resume_from_checkpoint=True, save_total_limit=2, safetensors"

    def load_libraries(self) -> None:
        """Import the trainer."""
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401
        from accelerate import Accelerator  # noqa: F401
        from transformers import Trainer  # noqa: F401

    def versions(self) -> dict[str, str]:
        """Return the trainer's."""
        return {name: importlib.metadata.version(name) for name in ("transformers", "accelerate")}

    def train(self, session: Session) -> None:
        """Train with a callback that tells."""
        from transformers import Trainer, TrainerCallback, TrainingArguments
        from transformers.trainer_utils import get_last_checkpoint

        class Tells(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
                session.resumed(state.global_step, self._digest(objects))

            def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
                if state.global_step % session.every == 0:
                    session.stepped(state.global_step, self._digest(objects))

            def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
                session.saved(state.global_step)

            def _digest(self, objects: dict[str, Any]) -> str:
                optimizer = objects["optimizer"]
                return digest(objects["model"].named_parameters(), getattr(optimizer, "optimizer", optimizer))

        arguments = TrainingArguments(
            output_dir=str(session.run),
            max_steps=100_000,
            per_device_train_batch_size=BATCH,
            save_strategy="steps",
            save_steps=session.every,
            save_total_limit=KEEP,
            lr_scheduler_type="constant",
            learning_rate=1e-3,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        data = [{"input_ids": row, "labels": row} for row in samples()]
        trainer = Trainer(model=build_model(), args=arguments, train_dataset=data, callbacks=[Tells()])
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(session.run)))

    def newest_files(self, run: Path) -> dict[str, Path]:
        """Weights and optimizer are files of their own."""
        newest = newest_folder(run, "checkpoint-*")
        assert newest is not None
        return {"weights": newest / "model.safetensors", "optimizer": newest / "optimizer.pt"}

    def repair(self, run: Path) -> None:
        """Remove the newest checkpoint folder."""
        newest = newest_folder(run, "checkpoint-*")
        if newest is not None:
            shutil.rmtree(newest)
