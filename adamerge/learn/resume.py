"""A run's checkpoint: written whole, read safely, held against the settings and inputs of now."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from adamerge._base.errors import AdamergeError
from adamerge._base.files import replacing

CHECKPOINT = Path("checkpoints", "last.ckpt")  # in a run's folder
_KEYS = ("adamerge", "state_dict", "global_step")  # what is read of it, beside Lightning's own


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
        reason = " ".join(str(error).split())[:120]
        raise AdamergeError(
            f"{path} is not a readable checkpoint ({reason}): put a copy of it there, or start "
            "the run again in another run_dir"
        ) from error
    if not isinstance(saved, dict) or any(key not in saved for key in _KEYS):
        raise AdamergeError(f"{path} is not a checkpoint of adamerge: expected one of its runs")
    return saved


def check_fingerprint(saved: Mapping[str, Any], now: Mapping[str, str], run_dir: Path) -> None:
    """Raises AdamergeError, naming every difference, unless a checkpoint fits what is loaded."""
    changed = differences(saved["adamerge"]["fingerprint"], now)
    if changed:
        raise AdamergeError(
            f"cannot go on with {run_dir}: {'; '.join(changed)}; undo that, or start a new run"
        )


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """`key was …, is …` for every key that differs."""
    return [
        f"{key} was {before.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
