"""Symmetries of a network: which axes of which tensors move together, and moving them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError

State = Mapping[str, Tensor]
Permutations = dict[str, Tensor]  # group -> indices [units]: new unit i is the old unit p[i]


@dataclass(frozen=True)
class Place:
    """Where the units of a group stand: along one axis of one tensor.

    The axis has `outer · units · inner` entries, units between: 3 · heads · head width in
    the joint projection of an attention, channels · pixels in the layer after a flattening.

    Attributes:
        tensor: a name of the state dict.
        axis: counted from 0.
        outer: how often all units come, one after the other.
        reads: whether the tensor reads the units (a layer's inputs) or makes them (its outputs).
    """

    tensor: str
    axis: int
    outer: int = 1
    reads: bool = False


@dataclass(frozen=True)
class Group:
    """Units that move together (hidden units, channels of a residual stream, heads).

    Attributes:
        units: how many there are.
        places: everywhere they stand.
    """

    units: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Spec:
    """The permutation symmetries of a network: the function stays the same when the units of a
    group are permuted in all its places.

    Attributes:
        groups: name -> group, in the order in which the network computes them.
    """

    groups: dict[str, Group]

    def __post_init__(self) -> None:
        taken: dict[tuple[str, int], str] = {}
        for name, group in self.groups.items():
            for place in group.places:
                other = taken.setdefault((place.tensor, place.axis), name)
                if other != name:
                    raise AdamergeError(
                        f"axis {place.axis} of tensor {place.tensor!r} is in the groups "
                        f"{other!r} and {name!r}: leave it in one of them"
                    )

    def check(self, state: State, what: str = "the state dict") -> None:
        """Raises AdamergeError, naming tensor and axis, unless the groups fit a state dict."""
        for name, group in self.groups.items():
            for place in group.places:
                _check(name, group, place, state, what)

    def touching(self, tensor: str) -> Iterator[tuple[str, Place]]:
        """The groups that stand in a tensor, and where."""
        for name, group in self.groups.items():
            for place in group.places:
                if place.tensor == tensor:
                    yield name, place


def _check(name: str, group: Group, place: Place, state: State, what: str) -> None:
    where = f"axis {place.axis} of tensor {place.tensor!r}"
    if place.tensor not in state:
        raise AdamergeError(
            f"{what} has no tensor {place.tensor!r}, of which group {name!r} permutes axis "
            f"{place.axis}: use a spec of this architecture"
        )
    shape = list(state[place.tensor].shape)
    if not 0 <= place.axis < len(shape):
        raise AdamergeError(
            f"{where} (group {name!r}) does not exist: in {what} its shape is {shape}; count axes "
            "from 0, or use a spec of this architecture"
        )
    size, whole = shape[place.axis], place.outer * group.units
    if size % whole or size == 0:
        times = f"{place.outer} x " if place.outer > 1 else ""
        raise AdamergeError(
            f"{where} (group {name!r}) has {size} entries in {what}, expected a multiple of "
            f"{times}{group.units} units: use a spec of this architecture"
        )


def from_table(
    table: Mapping[str, Group | Mapping[str, int]], state: State, units: Mapping[str, int] = {}
) -> Spec:
    """A spec written by hand: group -> {tensor: axis}, or group -> `Group`.

    Axis 1 is taken to read the units, any other to make them, as in linear and convolutional
    layers; a `Group` says it itself.

    Args:
        table: the groups, in the order in which the network computes them.
        state: of such a network, which the table must fit.
        units: of a group, where they are not all entries of the first axis that makes them.

    Raises:
        AdamergeError: naming the tensor and the axis that do not fit.

    >>> state = {"up.weight": torch.zeros(8, 3), "down.weight": torch.zeros(2, 8)}
    >>> from_table({"hidden": {"up.weight": 0, "down.weight": 1}}, state).groups["hidden"].units
    8
    """
    groups = {}
    for name, entry in table.items():
        if isinstance(entry, Group):
            groups[name] = entry
            continue
        places = tuple(Place(tensor, axis, reads=axis == 1) for tensor, axis in entry.items())
        sizes = [
            state[p.tensor].shape[p.axis]
            for p in sorted(places, key=lambda place: place.reads)
            if p.tensor in state and 0 <= p.axis < state[p.tensor].ndim
        ]
        groups[name] = Group(units.get(name, sizes[0] if sizes else 1), places)
    spec = Spec(groups)
    spec.check(state)
    return spec


def unfold(tensor: Tensor, place: Place, units: int) -> Tensor:
    """A tensor as `[units, numbers per unit]`."""
    shape = tensor.shape
    parts = tensor.reshape(*shape[: place.axis], place.outer, units, -1, *shape[place.axis + 1 :])
    return parts.movedim(place.axis + 1, 0).reshape(units, -1)


def carry(tensor: Tensor, place: Place, matrix: Tensor) -> Tensor:
    """A tensor whose units become combinations of its units.

    Args:
        matrix: `[new units, units]`.
    """
    shape, (new, units) = tensor.shape, matrix.shape
    parts = tensor.reshape(*shape[: place.axis], place.outer, units, -1, *shape[place.axis + 1 :])
    axis = place.axis + 1
    mixed = torch.tensordot(matrix.to(tensor.dtype), parts, dims=([1], [axis])).movedim(0, axis)
    size = shape[place.axis] // units * new
    return mixed.reshape(*shape[: place.axis], size, *shape[place.axis + 1 :])


def permuted(tensor: Tensor, place: Place, order: Tensor) -> Tensor:
    """A tensor whose units stand in another order."""
    shape, units = tensor.shape, len(order)
    parts = tensor.reshape(*shape[: place.axis], place.outer, units, -1, *shape[place.axis + 1 :])
    return parts.index_select(place.axis + 1, order.to(tensor.device)).reshape(shape)


def apply(spec: Spec, permutations: Mapping[str, Tensor], state: State) -> dict[str, Tensor]:
    """A state dict whose units are permuted: `new[i] = old[p[i]]` along every axis of a group.

    The network computes the same function as before. Tensors of groups without a permutation are
    handed on, not copied.

    Args:
        spec: of the network.
        permutations: group -> p `[units]`.
        state: left unchanged.

    Raises:
        AdamergeError: an unknown group, indices that are no permutation of its units, or a tensor
            and axis that do not fit.

    >>> spec = Spec({"h": Group(2, (Place("up", 0), Place("down", 1, reads=True)))})
    >>> state = {"up": torch.tensor([[1.0], [2.0]]), "down": torch.tensor([[3.0, 4.0]])}
    >>> apply(spec, {"h": torch.tensor([1, 0])}, state)["down"].tolist()
    [[4.0, 3.0]]
    """
    for name, order in permutations.items():
        if name not in spec.groups:
            raise AdamergeError(
                f"the permutations have a group {name!r}, which the spec has not: use those that "
                "were found with this spec"
            )
        units = spec.groups[name].units
        if order.is_floating_point() or order.sort().values.tolist() != list(range(units)):
            raise AdamergeError(
                f"the permutation of group {name!r} is not one of the numbers 0 to {units - 1}: "
                "use those that were found with this spec"
            )
    spec.check(state)
    moved = dict(state)
    for name, order in permutations.items():
        for place in spec.groups[name].places:
            moved[place.tensor] = permuted(moved[place.tensor], place, order)
    return moved


def identities(spec: Spec) -> Permutations:
    """The permutations that leave every unit in its place."""
    return {name: torch.arange(group.units) for name, group in spec.groups.items()}


def drawn(spec: Spec, seed: int = 0) -> Permutations:
    """Random permutations of all groups."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randperm(g.units, generator=generator) for n, g in spec.groups.items()}


def inverse(permutations: Mapping[str, Tensor]) -> Permutations:
    """The permutations that take others back."""
    return {name: order.argsort() for name, order in permutations.items()}
