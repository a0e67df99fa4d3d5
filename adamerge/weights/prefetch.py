"""τ that stays in host memory or on disk, brought to a GPU a group of layers ahead of its use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adamerge.weights.storage import Layer

_ALIGNED = 256  # bytes: where tensors begin within a slot


class Prefetcher:
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
        rooms = {name: _room(layer.values) + _room(layer.scales) for name, layer in layers.items()}
        sizes = [sum(rooms[name] for name in group) for group in groups]
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
            if self._now is not None:
                self._free[self._now[1]] = compute.record_event()
            if self._coming is None or self._coming[0] != group:
                self._coming = self._start(group)
            _, slot, layers, arrived = self._coming
            compute.wait_event(arrived)
            self._now, self._coming = (group, slot, layers), None
        if 0 <= then < len(self._groups):
            self._coming = self._start(then)
        return self._now[2]

    def _start(self, group: int) -> tuple[int, int, list[Layer], torch.cuda.Event]:
        slot = 0 if self._now is None else 1 - self._now[1]
        free, taken = self._free[slot], 0

        def copy(tensor: Tensor) -> Tensor:
            """Copies tensors one after the other into the slot."""
            nonlocal taken
            room = self._slots[slot, taken : taken + tensor.nbytes]
            taken += _room(tensor)
            source = tensor if tensor.is_pinned() else tensor.pin_memory()
            return room.view(tensor.dtype).view(tensor.shape).copy_(source, non_blocking=True)

        with torch.cuda.stream(self._stream):
            if free is not None:
                self._stream.wait_event(free)
            layers = [self._layers[name].map(copy) for name in self._groups[group]]
            return group, slot, layers, self._stream.record_event()


def _room(tensor: Tensor | None) -> int:
    return 0 if tensor is None else -(-tensor.nbytes // _ALIGNED) * _ALIGNED
