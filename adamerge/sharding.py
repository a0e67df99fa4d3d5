"""Gives every process of a run its part of the task vectors while it trains."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from adamerge.shards import ShardedTaskVectors


class Sharding(Callback):
    """Before the method moves to its device, so that no device ever holds more than its part."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Cuts the task vectors; the processes know each other by now."""
        method: Any = pl_module.method
        if trainer.world_size > 1:
            whole = method.task_vectors.whole
            method.task_vectors = ShardedTaskVectors(whole, trainer.global_rank, trainer.world_size)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts the whole back: what comes after training is the main process's alone."""
        method: Any = pl_module.method
        method.task_vectors = method.task_vectors.whole
