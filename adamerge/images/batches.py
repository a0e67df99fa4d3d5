"""Unlabeled batches, without end: drawn from mapped files, or on the device."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from adamerge._base.errors import AdamergeError

_CHUNK = 1024  # images read from the cache at a time


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
    _last: tuple[int, np.ndarray] = field(default=(-1, np.empty(0)), init=False, repr=False)

    def batch(self, step: int) -> np.ndarray:
        """The rows of one batch, `[B]`; a function of seed, task, rank and step alone."""
        start = (step * self.ranks + self.rank) * self.batch_size
        draws = np.arange(start, start + self.batch_size)
        epochs, places = draws // len(self.rows), draws % len(self.rows)
        picked = [self._order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return self.rows[np.concatenate(picked)]

    def needed(self, steps: int) -> np.ndarray:
        """The rows that so many steps draw, each once, in the order of the first epoch; a negative
        number of steps draws all of them."""
        count = len(self.rows) if steps < 0 else steps * self.ranks * self.batch_size
        return self.rows[self._order(0)[:count]]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self._last[0]:
            generator = np.random.default_rng(stream_seed("order", self.seed, self.task, epoch))
            self._last = (epoch, generator.permutation(len(self.rows)))
        return self._last[1]


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
        images = {task: _file_of(images) or images for task, images in self.images.items()}
        return {**self.__dict__, "images": images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        for task, images in self.images.items():
            if isinstance(images, Path):
                self.images[task] = np.load(images, mmap_mode="r")

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


def _file_of(images: np.ndarray | DeviceImages) -> Path | None:
    """The file of images that are one whole mapped file."""
    if isinstance(images, np.memmap) and isinstance(images.base, mmap.mmap) and images.filename:
        return Path(images.filename)
    return None


class DeviceImages:
    """Some rows of a task's images on a device, uint8; drawn from like the array they are of.

    They are read when they are first drawn from, so that a run that draws stored features in their
    place needs no memory for them.

    Args:
        images: uint8 `[N, 3, H, W]`, usually memory-mapped.
        rows: those that can be drawn, ascending.
        device: where they are kept.
    """

    def __init__(self, images: np.ndarray, rows: np.ndarray, device: torch.device) -> None:
        self.images, self.rows, self.device = images, rows, device
        self._kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return len(self.rows) * int(np.prod(self.images.shape[1:]))

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """`[B, 3, H, W]` of the given rows, on the device; nothing waits for it."""
        places = torch.from_numpy(np.searchsorted(self.rows, rows))
        if self.device.type == "cuda":
            places = places.pin_memory().to(self.device, non_blocking=True)
        if self._kept is None:
            shape = (len(self.rows), *self.images.shape[1:])
            self._kept = torch.empty(shape, dtype=torch.uint8, device=self.device)
            for start in range(0, len(self.rows), _CHUNK):
                some = np.asarray(self.images[self.rows[start : start + _CHUNK]])
                self._kept[start : start + len(some)] = torch.from_numpy(some)
        return self._kept.index_select(0, places)


def refuse_too_large(
    images: Mapping[str, DeviceImages], device: torch.device, free: int | None
) -> None:
    """Raises AdamergeError where they take more than `free` bytes of the device; None: unknown."""
    needed = sum(one.nbytes for one in images.values())
    if free is not None and needed > free:
        raise AdamergeError(
            f"images_on_device: the images take {needed / 1e9:.1f} GB and {device} has "
            f"{free / 1e9:.1f} GB free: set images_on_device=false, or use a device with more"
        )
