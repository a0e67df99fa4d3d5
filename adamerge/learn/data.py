"""The images of a run: unlabeled for training, labelled for evaluation only."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from adamerge._base.errors import AdamergeError
from adamerge.images.batches import DeviceImages, Stream, UnlabeledBatches, stream_seed
from adamerge.images.cache import TaskImages

PROTOCOLS = ("paper", "heldout")


class TaskData(pl.LightningDataModule):
    """Unlabeled multi-task batches for `fit`, and labelled batches for `evaluate`.

    Args:
        tasks: the cached images (and labels, if any) of each task.
        batch_size: images per task, step and rank.
        seed: of the order of the images.
        protocol: `paper` adapts on the unlabeled test images that are then scored; `heldout`
            adapts on one half of them and scores on the other (the halves depend on the task's
            name and size only, so runs with different seeds compare).
        num_workers: processes that read batches ahead; 0 reads in the training process.

    Attributes:
        wrap: turns the batches of images into what the steps take (see `features`); None: as is.
        on_device: whether `fit` keeps the images it adapts on on its device, see `DeviceImages`.

    Raises:
        AdamergeError: unknown protocol, or a task with too few images for it.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskImages],
        batch_size: int = 16,
        seed: int = 0,
        protocol: str = "paper",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if protocol not in PROTOCOLS:
            raise AdamergeError(f"protocol is {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        self.tasks = dict(tasks)
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.protocol, self.on_device = protocol, False
        self.wrap: Callable[[UnlabeledBatches], IterableDataset[Any]] | None = None
        self.adapt_rows: dict[str, np.ndarray] = {}
        self.score_rows: dict[str, np.ndarray] = {}
        for task, data in self.tasks.items():
            self.adapt_rows[task], self.score_rows[task] = _split(task, len(data.images), protocol)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches from the trainer's current step on: a resumed run sees what it would have."""
        trainer = self.trainer
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        device = trainer.strategy.root_device if trainer and self.on_device else None
        batches = self.batches(trainer.global_step if trainer else 0, rank, ranks, device)
        return DataLoader(
            batches if self.wrap is None else self.wrap(batches),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available() and device is None,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_signals,
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Pins what is not on the device yet, where the loader cannot because a part of it is."""
        if not (self.on_device and torch.cuda.is_available()):
            return batch
        return apply_to_collection(batch, Tensor, lambda t: t if t.is_cuda else t.pin_memory())

    def batches(
        self, first_step: int = 0, rank: int = 0, ranks: int = 1, device: torch.device | None = None
    ) -> UnlabeledBatches:
        """The endless adaptation batches of one rank; labels are not within its reach.

        Args:
            device: where the images are kept and drawn; None: on the host, as they lie on disk.
        """
        streams = [
            Stream(task, rows, self.seed, self.batch_size, rank, ranks)
            for task, rows in self.adapt_rows.items()
        ]
        if device is not None:
            return UnlabeledBatches(self.held(device), streams, first_step)
        images = {task: data.images for task, data in self.tasks.items()}
        return UnlabeledBatches(images, streams, first_step)

    def held(self, device: torch.device) -> dict[str, DeviceImages]:
        """The images adapted on, to be kept on a device; nothing is read yet."""
        return {
            task: DeviceImages(data.images, self.adapt_rows[task], device)
            for task, data in self.tasks.items()
        }

    def labelled(
        self, task: str, part: str = "score", batch_size: int = 256
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`(uint8 images, int64 labels)` batches of one task, in order; for evaluation only.

        Args:
            part: `score` (the images that count) or `adapt` (those adapted on).
        """
        data = self.tasks[task]
        if data.labels is None:
            raise AdamergeError(f"task {task!r} has no labels: its accuracy cannot be measured")
        rows = (self.score_rows if part == "score" else self.adapt_rows)[task]
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            yield torch.from_numpy(data.images[chosen]), torch.from_numpy(data.labels[chosen])

    def picked(self, word: str, task: str, count: int) -> np.ndarray:
        """At most `count` rows of a task adapted on, always the same for a seed and a word."""
        generator = np.random.default_rng(stream_seed(word, self.seed, task))
        return generator.permutation(self.adapt_rows[task])[:count]

    def some(self, word: str, count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The picked images of every task in order of their rows, `size` at a time: uint8, and the
        index of their task."""
        for index, (task, data) in enumerate(self.tasks.items()):
            rows = np.sort(self.picked(word, task, count))
            for start in range(0, len(rows), size):
                images = torch.from_numpy(data.images[rows[start : start + size]])
                yield images, torch.full((len(images),), index)

    def sample(self, task: str, count: int) -> Tensor:
        """The first few scored images of a task, uint8 `[≤ count, 3, H, W]`."""
        return torch.from_numpy(self.tasks[task].images[self.score_rows[task][:count]])


def _leave_signals(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the main one may answer it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _split(task: str, size: int, protocol: str) -> tuple[np.ndarray, np.ndarray]:
    least = 2 if protocol == "heldout" else 1
    if size < least:
        raise AdamergeError(
            f"task {task!r} has {size} images: protocol {protocol} needs at least {least}"
        )
    if protocol == "paper":
        return np.arange(size), np.arange(size)
    order = np.random.default_rng(stream_seed("halves", task, size)).permutation(size)
    return np.sort(order[: size // 2]), np.sort(order[size // 2 :])
