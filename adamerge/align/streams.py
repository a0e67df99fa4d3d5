"""Channels of a network that move together, collected while its forward pass is read.

A stream is a set of channels. Reading may join two streams into one, or fix a stream in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adamerge.align.symmetry import Group, Place, Spec

FIXED = 0  # the stream of all channels that must stay where they are


@dataclass(frozen=True)
class Wire:
    """Channels in a value of the graph.

    Attributes:
        stream: whose channels they are.
        axis: where they stand, counted from the end (-1, -2, …).
        ndim: of the value, None where it is not known.
        flat: what stands beside them on their axis after a flattening: nothing (None), or the
            channels come first (`inner`) or last (`outer`).
    """

    stream: int
    axis: int = -1
    ndim: int | None = None
    flat: str | None = None


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer that the forward pass uses itself."""

    tensor: Tensor


class Streams:
    """The streams of channels of a module, joined as the graph is read; and where they stand.

    Args:
        module: whose tensors they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names: dict[int, list[str]] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            self.names.setdefault(id(tensor), []).append(name)
        self.parent = [FIXED]
        self.units = [1]
        self.titles = [""]
        self.found: dict[tuple[int, int], tuple[Tensor, int, str | None, bool]] = {}

    def new(self, title: str, units: int) -> int:
        """A new stream of so many channels."""
        self.parent.append(len(self.parent))
        self.units.append(units)
        self.titles.append(title)
        return len(self.parent) - 1

    def root(self, stream: int) -> int:
        while self.parent[stream] != stream:
            stream = self.parent[stream]
        return stream

    def join(self, one: int, other: int) -> None:
        """Makes one stream of two; those of another number of channels are fixed."""
        low, high = sorted((self.root(one), self.root(other)))
        if low != high and low != FIXED and self.units[low] != self.units[high]:
            self.parent[low] = FIXED
            low = FIXED
        self.parent[high] = low

    def fix(self, *wires: Wire) -> Wire:
        """Fixes channels in place."""
        for wire in wires:
            self.join(FIXED, wire.stream)
        return Wire(FIXED)

    def count(self, wire: Wire) -> int | None:
        """How many channels there are, None if they are fixed."""
        root = self.root(wire.stream)
        return None if root == FIXED else self.units[root]

    def place(self, wire: Wire, tensor: Tensor | None, axis: int, reads: bool = False) -> None:
        """Says that a stream stands along an axis of a tensor."""
        if tensor is None:
            return
        if id(tensor) not in self.names:  # computed from others, as by a parametrization
            self.fix(wire)
            return
        entry = (tensor, wire.stream, wire.flat, reads)
        _, stream, flat, _ = self.found.setdefault((id(tensor), axis), entry)
        self.join(stream, wire.stream)
        if flat != wire.flat:
            self.fix(wire)

    def spec(self) -> Spec:
        """The groups of all streams that are free, in the order in which they are made."""
        groups: dict[int, list[Place]] = {}
        for (key, axis), (tensor, stream, flat, reads) in self.found.items():
            root = self.root(stream)
            if root == FIXED or self.units[root] < 2:
                continue
            outer = tensor.shape[axis] // self.units[root] if flat == "outer" else 1
            places = groups.setdefault(root, [])
            places += [Place(name, axis, outer, reads) for name in self.names[key]]
        return Spec(
            {self.titles[r]: Group(self.units[r], tuple(groups[r])) for r in sorted(groups)}
        )


def wires_in(value: Any) -> list[Wire]:
    """All wires in nested arguments."""
    if isinstance(value, Wire):
        return [value]
    if isinstance(value, dict):
        return wires_in(list(value.values()))
    if isinstance(value, tuple | list):
        return [wire for part in value for wire in wires_in(part)]
    if isinstance(value, slice):
        return wires_in([value.start, value.stop, value.step])
    return []
