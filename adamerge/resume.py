"""A run's checkpoint: read safely, and held against the settings and inputs of now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adamerge.errors import AdamergeError

CHECKPOINT = Path("checkpoints", "last.ckpt")  # in a run's folder


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A run's `last.ckpt`, read without executing anything in it.

    Raises:
        AdamergeError: missing, damaged, or not one of adamerge's.
    """
    if not path.is_file():
        raise AdamergeError(
            f"{path} does not exist: the run was stopped before its first checkpoint; start it "
            "again by the command that started it, with the same run_dir"
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever is wrong with it, it is not a checkpoint of ours
        reason = " ".join(str(error).split())[:120]
        raise AdamergeError(f"{path} is not a readable checkpoint ({reason})") from error
    if not isinstance(saved, dict) or "adamerge" not in saved:
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
