"""Training scripts of one's own around PyTorch: `torch.save` over one file, the same with a rename, and DCP."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from peers.systems import BATCH, KEEP, SAMPLES, System, build_model, newest_folder, samples
from peers.trial import Session, digest


class Script(System):
    """A loop as in many small repositories; the way of saving is the subclass's.

    The sample order is a function of the step, so data order says nothing about the way of saving.
    """

    def load_libraries(self) -> None:
        """Import the model's library."""
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    def train(self, session: Session) -> None:
        """Resume from the newest state there is; step; save."""
        torch.manual_seed(0)
        model, data = build_model(), samples()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = self.load(session.run, model, optimizer)
        session.resumed(step, digest(model.named_parameters(), optimizer))
        while True:
            order = torch.randint(0, SAMPLES, (BATCH,), generator=torch.Generator().manual_seed(step))
            batch = data[order]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % session.every == 0:
                session.stepped(step, digest(model.named_parameters(), optimizer))
                self.save(session.run, step, model, optimizer)
                session.saved(step)

    def load(self, run: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put the newest state back; return its step, 0 where there is none."""
        raise NotImplementedError

    def save(self, run: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save the state after `step`."""
        raise NotImplementedError


class TorchSave(Script):
    """`torch.save` over the one file, as in nanoGPT."""

    name = "torch-save"
    title = "torch.save over one file"
    settings = "torch.save(..., 'ckpt.pt') every time, torch.load(weights_only=True)"

    def load(self, run: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the one file."""
        path = run / "ckpt.pt"
        if not path.exists():
            return 0
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])

    def save(self, run: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Overwrite the one file."""
        torch.save(self.state(step, model, optimizer), run / "ckpt.pt")

    def state(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return what is saved."""
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}

    def newest_files(self, run: Path) -> dict[str, Path]:
        """The one file holds both."""
        return {"both": run / "ckpt.pt"}

    def repair(self, run: Path) -> None:
        """Remove the file: nothing else is there."""
        (run / "ckpt.pt").unlink(missing_ok=True)


class TorchRename(TorchSave):
    """`torch.save` beside the file, then a rename over it, without fsync."""

    name = "torch-rename"
    title = "torch.save to a temporary name, renamed"
    settings = "torch.save(..., 'ckpt.pt.tmp'), os.replace; no fsync"

    def save(self, run: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write beside, then replace."""
        temporary = run / "ckpt.pt.tmp"
        torch.save(self.state(step, model, optimizer), temporary)
        temporary.replace(run / "ckpt.pt")


class Dcp(Script):
    """`torch.distributed.checkpoint` into a new folder for every step; one counts when `.metadata` is there."""

    name = "dcp"
    title = "DCP, a new folder for each step"
    settings = "dcp.save into step-N (files synced: its default), the newest with .metadata is loaded, 2 kept"

    def load_libraries(self) -> None:
        """Import DCP too."""
        super().load_libraries()
        import torch.distributed.checkpoint.state_dict  # noqa: F401

    def load(self, run: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest complete folder, with the state-dict functions that put optimizer moments back too."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        newest = newest_folder(run, "step-*", ".metadata")
        if newest is None:
            return 0
        weights, moments = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": moments, "step": 0}
        dcp.load(state, checkpoint_id=str(newest), no_dist=True)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return int(state["step"])

    def save(self, run: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a new folder, then remove what is beyond two."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        target = run / f"step-{step}"
        # What a killed save left under this name has no .metadata, and DCP wants an empty folder.
        if target.exists():
            shutil.rmtree(target)
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "step": step}
        dcp.save(state, checkpoint_id=str(target), no_dist=True)
        complete = [path.parent for path in run.glob("step-*/.metadata")]
        for path in sorted(complete, key=lambda path: int(path.name.rpartition("-")[2]))[:-KEEP]:
            shutil.rmtree(path)

    def newest_files(self, run: Path) -> dict[str, Path]:
        """One data file holds both."""
        newest = newest_folder(run, "step-*", ".metadata")
        assert newest is not None
        return {"both": next(newest.glob("*.distcp"))}

    def repair(self, run: Path) -> None:
        """Remove the newest complete folder."""
        newest = newest_folder(run, "step-*", ".metadata")
        if newest is not None:
            shutil.rmtree(newest)
