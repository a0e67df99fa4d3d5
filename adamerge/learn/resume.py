"""A run's checkpoint: written whole, read safely, held against the settings and inputs of now."""

from __future__ import annotations

import contextlib
import io
import os
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback

from adamerge._base.errors import AdamergeError, one_line
from adamerge._base.files import replacing
from adamerge.learn.adaptation import Adaptation

CHECKPOINT = Path("checkpoints", "last.ckpt")  # in a run's folder
_KEYS = ("adamerge", "state_dict", "global_step")  # what is read of it, beside Lightning's own


class Checkpoints(Callback):
    """`last.ckpt` every few steps and at any end, written by `CheckpointFiles`.

    It holds the learned state, optimizer, scheduler, step, random state and the fingerprint of
    settings and inputs; nothing that can be read from the inputs again. Lightning's ModelCheckpoint
    takes a `::` in a path for a URL, and does not save what an exception interrupts.
    """

    def __init__(self, path: Path, every: int, fingerprint: Mapping[str, str]) -> None:
        self.path, self.every, self.fingerprint = path, every, dict(fingerprint)
        self._saved = -1

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["adamerge"] = self._record()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["adamerge"]["rng"]
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        random.setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        if trainer.global_step % self.every == 0:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, Adaptation):
            pl_module.refuse_failure()
        self.save(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # Saving waits for all processes, so they must all have come here for the same reason.
        refused = isinstance(exception, AdamergeError)
        with contextlib.suppress(AdamergeError, RuntimeError):  # a device that is lost
            if isinstance(pl_module, Adaptation):
                pl_module.refuse_failure()
        with contextlib.suppress(OSError):  # the exception under way is the one to report
            if trainer.world_size == 1 or refused:
                self.save(trainer, again=refused)

    def save(self, trainer: pl.Trainer, again: bool = False) -> None:
        """Saves, unless this step is saved already and nothing changed since."""
        if trainer.global_step != self._saved or again:
            trainer.save_checkpoint(self.path, weights_only=False)  # the main process alone writes
            self._saved = trainer.global_step

    def _record(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - third parties use this one
        rng = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
            "python": random.getstate(),
            "numpy": [kind, np.asarray(keys).tolist(), *rest],
        }
        return {"fingerprint": self.fingerprint, "rng": rng}

    def save_nothing(self) -> None:
        """The checkpoint of a method that has nothing to learn."""
        content = {"adamerge": self._record(), "state_dict": {}, "global_step": 0}
        CheckpointFiles().save_checkpoint(content, self.path)


class CheckpointFiles(CheckpointIO):
    """How Lightning writes and reads checkpoints: beside their place, on the disk, then renamed.

    Its own way takes a path for a URL and writes by way of the folder for temporary files.
    """

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Replaces the file at `path`, whole or not at all."""
        written = io.BytesIO()  # an error of the disk is an `OSError` only where we write
        torch.save(checkpoint, written)
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            file.write(written.getbuffer())
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """As `read_checkpoint`."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Removes the file."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A run's `last.ckpt`, read without executing anything in it.

    It is a zip file, with a checksum of everything in it, which `torch.load` does not look at.

    Raises:
        AdamergeError: missing, damaged, or not one of adamerge's.
    """
    if not path.is_file():
        raise AdamergeError(
            f"{path} does not exist: the run was stopped before its first checkpoint; start it "
            "again by the command that started it, with the same run_dir"
        )
    try:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as parts:
            damaged = parts.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content.seek(0)
        saved = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever is wrong with it, it is not a checkpoint of ours
        reason = one_line(error, 120)
        raise AdamergeError(
            f"{path} is not a readable checkpoint ({reason}): put a copy of it there, or start "
            "the run again in another run_dir"
        ) from error
    if not isinstance(saved, dict) or any(key not in saved for key in _KEYS):
        raise AdamergeError(f"{path} is not a checkpoint of adamerge: expected one of its runs")
    return saved


def check_fingerprint(saved: Mapping[str, Any], now: Mapping[str, str], run_dir: Path) -> None:
    """Raises AdamergeError, naming every difference, unless a checkpoint fits what is loaded."""
    before = saved["adamerge"]["fingerprint"]
    changed = [
        f"{key} was {before.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise AdamergeError(
            f"cannot go on with {run_dir}: {'; '.join(changed)}; undo that, or start a new run"
        )
