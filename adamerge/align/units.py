"""What the units of a network put out on inputs, and how alike those of two networks are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from adamerge._base.errors import AdamergeError
from adamerge.align.symmetry import Group, Place, Spec

Values = dict[str, list[Tensor]]  # group -> of each layer, [units, numbers per unit, samples]


def call(module: nn.Module, batch: Any) -> Any:
    """A module on a batch: a tensor, a tuple of arguments or a mapping of named ones."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


def makers(module: nn.Module, group: Group) -> list[tuple[str, nn.Module, Place]]:
    """The layers that make the units of a group, by name, with the place in their weight."""
    found = []
    for place in group.places:
        path, _, key = place.tensor.rpartition(".")
        if place.reads or key not in ("weight", "in_proj_weight"):
            continue
        with contextlib.suppress(AttributeError):
            found.append((path, module.get_submodule(path), place))
    return found


@torch.no_grad()
def unit_values(spec: Spec, module: nn.Module, batch: Any) -> Values:
    """What every unit puts out on a batch, of each layer that makes the units or normalises them.

    A unit that stands for many numbers (a head) has them all.

    Args:
        spec: of the module.
        module: run as it is; put it in evaluation mode.
        batch: a tensor, a tuple of arguments, or a mapping of named ones.

    Raises:
        AdamergeError: a group has no layer whose outputs are its units.
    """
    values: Values = {name: [] for name in spec.groups}
    with contextlib.ExitStack() as stack:
        for name, group in spec.groups.items():
            for _, layer, place in makers(module, group):
                hook = _hook(values[name], group.units, place)
                handle = layer.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        call(module, batch)
    for name, group in spec.groups.items():
        if not values[name]:
            raise AdamergeError(
                f"group {name!r} has no linear, convolutional, norm or embedding layer that makes "
                f"its units (its tensors: {group.places[0].tensor!r} …): align by weights instead"
            )
    return values


def _hook(values: list[Tensor], units: int, place: Place) -> Callable[..., None]:
    def note(layer: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if isinstance(layer, nn.MultiheadAttention):  # its queries, keys and values are not seen
            tokens = args[0] if args else kwargs["query"]
            output = linear(tokens, layer.in_proj_weight, layer.in_proj_bias)
        axis = channel_axis(layer, place)
        rows = output.movedim(axis, 0).reshape(output.shape[axis], -1)
        parts = rows.reshape(place.outer, units, -1, rows.shape[1]).movedim(1, 0)
        values.append(parts.reshape(units, -1, rows.shape[1]))

    return note


def channel_axis(layer: nn.Module, place: Place) -> int:
    """Where the channels stand in a layer's output."""
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return place.axis - len(layer.normalized_shape)
    last = isinstance(layer, nn.Linear | nn.Embedding | nn.MultiheadAttention)
    return -1 if last else 1


@dataclass
class Products:
    """Sums over samples of two networks' units, of one layer: what likenesses are made of.

    Attributes:
        count: samples.
        sums: of each, `[units, numbers per unit]`.
        squares: of each, `[units]`.
        cross: the products of every unit with every other, `[units, units]`.
    """

    count: int
    sums: tuple[Tensor, Tensor]
    squares: tuple[Tensor, Tensor]
    cross: Tensor

    def __add__(self, other: Products) -> Products:
        sums = self.sums[0] + other.sums[0], self.sums[1] + other.sums[1]
        squares = self.squares[0] + other.squares[0], self.squares[1] + other.squares[1]
        return Products(self.count + other.count, sums, squares, self.cross + other.cross)

    @classmethod
    def of(cls, one: Tensor, other: Tensor) -> Products:
        """Of outputs `[units, numbers per unit, samples]`, summed in float64."""
        if one.shape[1:] != other.shape[1:]:
            raise AdamergeError(
                f"units of two networks put out {list(one.shape[1:])} and {list(other.shape[1:])} "
                "numbers on the same inputs: align networks of the same kind"
            )
        a, b = one.double(), other.double()
        sums = a.sum(2), b.sum(2)
        squares = a.square().sum((1, 2)), b.square().sum((1, 2))
        return cls(a.shape[2], sums, squares, a.flatten(1) @ b.flatten(1).T)

    def correlation(self) -> Tensor:
        """Of every unit of one with every unit of the other; 0 where one never changes."""
        means = [total / self.count for total in self.sums]
        covariance = self.cross / self.count - means[0] @ means[1].T
        spread = []
        for mean, squares in zip(means, self.squares, strict=True):
            power = squares / self.count
            variance = power - mean.square().sum(1)
            dead = variance <= 1e-12 * power
            spread.append(torch.where(dead, torch.inf, variance.clamp_min(0).sqrt()))
        return covariance / (spread[0][:, None] * spread[1])

    def distances(self) -> Tensor:
        """The mean squared distance between the outputs of every two units."""
        both = self.squares[0][:, None] + self.squares[1]
        return (both - 2 * self.cross).clamp_min(0) / self.count


def products(
    pairs: Iterable[tuple[Values, Values]],
) -> dict[str, list[Products]]:
    """The products of two networks' units, added over batches: group -> of each layer.

    Raises:
        AdamergeError: there are no batches, or the networks differ in their layers.
    """
    found: dict[str, list[Products]] = {}
    for one, other in pairs:
        for name in one:
            if len(one[name]) != len(other[name]):
                raise AdamergeError(
                    f"the units of group {name!r} are made by {len(one[name])} layers in one "
                    f"network and by {len(other[name])} in the other: align networks of one "
                    "architecture"
                )
            new = [Products.of(a, b) for a, b in zip(one[name], other[name], strict=True)]
            before = found.get(name)
            found[name] = [x + y for x, y in zip(before, new, strict=True)] if before else new
    if not found:
        raise AdamergeError("no batches of inputs were given: outputs of units need at least one")
    return found


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """While open, modules are in evaluation mode."""
    training = [module for root in modules for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
