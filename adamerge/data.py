"""Unlabeled batches for adaptation, and labelled batches for evaluation only."""

from __future__ import annotations

import hashlib
import json
import mmap
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from adamerge.device_images import DeviceImages
from adamerge.errors import AdamergeError
from adamerge.image_cache import TaskImages

PROTOCOLS = ("paper", "heldout")


def stream_seed(*parts: object) -> int:
    """A seed that depends on nothing but its parts, the same in every process and session."""
    digest = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).digest()
    return int.from_bytes(digest[:8], "little")


@dataclass
class Stream:
    """An infinite shuffled order over `rows` that keeps no state.

    Draw i comes from epoch i // N, at place i % N of that epoch's permutation. Batch `step` of
    rank r out of R takes draws `(step · R + r) · B …`, so ranks draw disjoint images and R ranks
    with B images each see exactly what one rank with R · B sees.
    """

    task: str
    rows: np.ndarray
    seed: int
    batch_size: int
    rank: int = 0
    ranks: int = 1

    def batch(self, step: int) -> np.ndarray:
        """The rows of one batch, `[B]`; a function of seed, task, rank and step alone."""
        start = (step * self.ranks + self.rank) * self.batch_size
        draws = np.arange(start, start + self.batch_size)
        epochs, places = draws // len(self.rows), draws % len(self.rows)
        picked = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            picked[here] = self._order(int(epoch))[places[here]]
        return self.rows[picked]

    def needed(self, steps: int) -> np.ndarray:
        """The rows that so many steps draw, each once, in the order of the first epoch; a negative
        number of steps draws all of them."""
        count = len(self.rows) if steps < 0 else steps * self.ranks * self.batch_size
        return self.rows[self._order(0)[:count]]

    def _order(self, epoch: int) -> np.ndarray:
        cached: tuple[int, np.ndarray] | None = self.__dict__.get("_last")
        if cached is None or cached[0] != epoch:
            generator = np.random.default_rng(stream_seed("order", self.seed, self.task, epoch))
            cached = (epoch, generator.permutation(len(self.rows)))
            self.__dict__["_last"] = cached
        return cached[1]


class UnlabeledBatches(IterableDataset[dict[str, Tensor]]):
    """`{task: uint8 [B, 3, H, W]}` per step, from `first_step` on, without end.

    Several DataLoader workers take turns, which keeps the order of the steps. To a process that is
    started, not forked, mapped images go as their path.
    """

    def __init__(
        self,
        images: Mapping[str, np.ndarray | DeviceImages],
        streams: list[Stream],
        first_step: int,
    ) -> None:
        super().__init__()
        self.images, self.streams, self.first_step = dict(images), streams, first_step

    def __getstate__(self) -> dict[str, Any]:
        kept = {task: _path_of(images) for task, images in self.images.items()}
        return {**self.__dict__, "images": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.images = {
            task: np.load(images, mmap_mode="r") if isinstance(images, Path) else images
            for task, images in state["images"].items()
        }

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        step = self.first_step + (worker.id if worker else 0)
        stride = worker.num_workers if worker else 1
        while True:
            yield {
                stream.task: torch.as_tensor(self.images[stream.task][stream.batch(step)])
                for stream in self.streams
            }
            step += stride


def _path_of(images: np.ndarray | DeviceImages) -> np.ndarray | DeviceImages | Path:
    """The file of images that are one whole mapped file; other images as they are."""
    if isinstance(images, np.memmap) and isinstance(images.base, mmap.mmap) and images.filename:
        return Path(images.filename)
    return images


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

    def sample(self, task: str, count: int) -> Tensor:
        """The first few scored images of a task, uint8 `[≤ count, 3, H, W]`."""
        return torch.from_numpy(self.tasks[task].images[self.score_rows[task][:count]])


def _leave_signals(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the main one may answer it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _split(task: str, size: int, protocol: str) -> tuple[np.ndarray, np.ndarray]:
    if size < (2 if protocol == "heldout" else 1):
        raise AdamergeError(
            f"task {task!r} has {size} images: protocol {protocol} needs at least "
            f"{2 if protocol == 'heldout' else 1}"
        )
    everything = np.arange(size)
    if protocol == "paper":
        return everything, everything
    order = np.random.default_rng(stream_seed("halves", task, size)).permutation(size)
    return np.sort(order[: size // 2]), np.sort(order[size // 2 :])
