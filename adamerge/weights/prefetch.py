"""τ that stays in host memory or on disk, brought to a GPU a group of layers ahead of its use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from adamerge.weights.storage import Layer

_ALIGNED = 256  # bytes: where tensors begin within a slot


class Ahead:
    """Copies a group of layers to the GPU on a stream of its own while the GPU computes on another.

    Two slots of GPU memory, each as large as the largest group: what is in use, and what is coming.
    A slot is filled again only after everything that was asked of the GPU with its last group.

    Args:
        layers: in host memory, best pinned; what is not is pinned while it is copied.
        groups: the names of each group's layers.
        device: a GPU.
    """

    def __init__(
        self, layers: Mapping[str, Layer], groups: Sequence[Sequence[str]], device: torch.device
    ) -> None:
        self._layers, self._groups, self._device = layers, groups, device
        self._stream = torch.cuda.Stream(device)
        sizes = [sum(_room(layers[name]) for name in group) for group in groups]
        self._slots = torch.empty((2, max(sizes)), dtype=torch.uint8, device=device)
        # The memory may still be in use by what was asked of the GPU before, and by copies after.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._slots.record_stream(self._stream)
        self._free: list[torch.cuda.Event | None] = [None, None]
        self._now: tuple[int, int, list[Layer]] | None = None  # group, slot, layers in use
        self._coming: tuple[int, int, list[Layer], torch.cuda.Event] | None = None

    def bring(self, group: int, then: int) -> list[Layer]:
        """The layers of a group, valid until the next call; starts with those of `then`, if any."""
        compute = torch.cuda.current_stream(self._device)
        if self._now is None or self._now[0] != group:
            self._take(group, compute)
        assert self._now is not None
        if 0 <= then < len(self._groups):
            self._coming = self._start(then)
        return self._now[2]

    def _take(self, group: int, compute: torch.cuda.Stream) -> None:
        if self._now is not None:
            self._free[self._now[1]] = compute.record_event()
        if self._coming is None or self._coming[0] != group:
            self._coming = self._start(group)
        _, slot, layers, arrived = self._coming
        compute.wait_event(arrived)
        self._now, self._coming = (group, slot, layers), None

    def _start(self, group: int) -> tuple[int, int, list[Layer], torch.cuda.Event]:
        slot = 0 if self._now is None else 1 - self._now[1]
        free, place = self._free[slot], 0
        found = []
        with torch.cuda.stream(self._stream):
            if free is not None:
                self._stream.wait_event(free)
            for name in self._groups[group]:
                layer = self._layers[name]
                found.append(layer.map(_into(self._slots[slot, place:])))
                place += _room(layer)
            return group, slot, found, self._stream.record_event()


def _into(slot: Tensor) -> Callable[[Tensor], Tensor]:
    """Copies tensors one after the other into a slot of bytes."""
    taken = 0

    def copy(tensor: Tensor) -> Tensor:
        nonlocal taken
        room = slot[taken : taken + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        taken += _up(tensor.nbytes)
        source = tensor if tensor.is_pinned() else tensor.pin_memory()
        return room.copy_(source, non_blocking=True)

    return copy


def _room(layer: Layer) -> int:
    return _up(layer.values.nbytes) + (0 if layer.scales is None else _up(layer.scales.nbytes))


def _up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
