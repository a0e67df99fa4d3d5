"""A task's images kept whole on the device that trains."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from adamerge.errors import AdamergeError

_CHUNK = 1024  # images read from the cache at a time


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
            self._kept = self._read()
        return self._kept.index_select(0, places)

    def _read(self) -> Tensor:
        shape = (len(self.rows), *self.images.shape[1:])
        kept = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for start in range(0, len(self.rows), _CHUNK):
            chunk = self.images[self.rows[start : start + _CHUNK]]
            kept[start : start + len(chunk)] = torch.from_numpy(np.asarray(chunk))
        return kept


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
