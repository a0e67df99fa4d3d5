"""Where a run computes: its device, its processes."""

from __future__ import annotations

import torch

from adamerge._base.errors import AdamergeError
from adamerge.config.settings import Config


def may_touch_gpu(trainer: Config) -> bool:
    """Whether this process may touch a GPU: not where it computes elsewhere, or is forked later."""
    forks = any(word in str(trainer.get("strategy")) for word in ("fork", "notebook"))
    return trainer["accelerator"] in ("auto", "gpu", "cuda") and not forks


def run_device(trainer: Config) -> torch.device:
    """Where the main process of a run computes, by its `trainer` settings."""
    # A process that has touched a GPU cannot be forked.
    if not may_touch_gpu(trainer) or not torch.cuda.is_available():
        return torch.device("cpu")
    devices = trainer.get("devices")
    if isinstance(devices, str) and "," in devices:  # as the Trainer reads it: their numbers
        devices = [int(part) for part in devices.split(",") if part.strip().isdigit()]
    first = devices[0] if isinstance(devices, list) and devices else 0
    return torch.device("cuda", first if isinstance(first, int) and first >= 0 else 0)


def place(settings: Config) -> None:
    """Refuses task vectors on a GPU where a run computes elsewhere."""
    if (
        settings["task_vectors"]["device"] == "cuda"
        and run_device(settings["trainer"]).type != "cuda"
    ):
        raise AdamergeError(
            "task_vectors.device is cuda, but this run computes on the CPU: leave it at auto, or "
            "set host or disk; or use a machine with a GPU (trainer.accelerator=gpu)"
        )


def ranks(trainer: Config) -> int | None:
    """Processes of a run, as far as its settings tell: `auto`, -1 and texts are the Trainer's."""
    devices, nodes = trainer["devices"], trainer.get("num_nodes", 1)
    count = len(devices) if isinstance(devices, list) else devices
    known = isinstance(count, int) and count > 0 and isinstance(nodes, int)
    return count * nodes if known else None
