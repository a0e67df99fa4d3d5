"""The merge `θ0 + Σ_t λ_t τ_t` of a group of layers as one node of autograd, and its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge.weights import fused
from adamerge.weights.storage import Layer, contract, merge

_TOGETHER = 2**20  # numbers of small layers that are merged together


class Source(Protocol):
    """What is merged: groups of layers, and the τ of a group when it is asked for."""

    def bases(self, group: int) -> list[Tensor]:
        """θ0 of a group's layers, on the device that computes."""
        ...

    def bring(self, group: int, then: int) -> list[Layer]:
        """τ of a group's layers on that device; the group `then` will be asked for next."""
        ...


class Merge(torch.autograd.Function):
    """`[T, l]` coefficients -> l merged tensors; the backward contracts dL/dW with τ once.

    Plain autograd would keep T scaled copies of the model per merge and walk them again for every
    backward pass; here the graph holds a node that needs nothing but τ itself.
    """

    @staticmethod
    def forward(
        ctx: Any, columns: Tensor, source: Source, group: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        ctx.source, ctx.group, ctx.dtype = source, group, columns.dtype
        ctx.set_materialize_grads(False)
        bases = source.bases(group)
        with torch.autocast(columns.device.type, enabled=False):
            return tuple(merge_all(bases, source.bring(group, group + 1), columns, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        bases = ctx.source.bases(ctx.group)
        with torch.autocast(bases[0].device.type, enabled=False):
            layers = ctx.source.bring(ctx.group, ctx.group - 1)
            return contract_all(grads, bases, layers).to(ctx.dtype), None, None, None


def merge_all(
    bases: Sequence[Tensor], layers: Sequence[Layer], columns: Tensor, dtype: torch.dtype | None
) -> list[Tensor]:
    """`θ0 + Σ_t columns[t, l] τ_t` of every layer l, summed in the type of θ0.

    On a GPU all layers together, in a few launches (`fused`); else one after the other.

    Args:
        columns: `[T, l]`, cast to the type of θ0.
        dtype: of the merged matrices; None: that of θ0. Vectors keep it always, for normalisations
            compute in it anyway.
    """
    merged = fused.merge(bases, layers, columns, dtype)
    if merged is not None:
        return merged
    return [
        merge(base, layer, column.to(base.dtype)).to(as_type(base, dtype))
        for base, layer, column in zip(bases, layers, columns.unbind(1), strict=True)
    ]


def contract_all(
    grads: Sequence[Tensor | None], bases: Sequence[Tensor], layers: Sequence[Layer]
) -> Tensor:
    """`⟨grad_l, τ_t,l⟩`, `[T, l]`, in the type of θ0; 0 for layers without part in the loss."""
    contracted = fused.contract(grads, bases, layers)
    if contracted is not None:
        return contracted
    columns = [
        base.new_zeros(len(layer.values)) if grad is None else contract(grad, layer, base)
        for grad, base, layer in zip(grads, bases, layers, strict=True)
    ]
    return torch.stack(columns, dim=1)


def as_type(base: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type of a merged layer: matrices in `dtype` if there is one, vectors as θ0."""
    return base.dtype if dtype is None or base.ndim < 2 else dtype


def neighbours(layers: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Neighbouring layers to be merged together: as many as are no larger than the largest layer,
    or a million numbers."""
    most = max(_TOGETHER, *(tensor.numel() for tensor in layers.values()))
    groups: list[list[str]] = []
    room = 0
    for name, tensor in layers.items():
        room -= tensor.numel()
        if room < 0 or not groups:
            groups.append([])
            room = most - tensor.numel()
        groups[-1].append(name)
    return [tuple(group) for group in groups]
