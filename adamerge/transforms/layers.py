"""Task vectors changed one layer at a time, and arguments checked: what transforms share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.weights.task_vectors import TaskVectors

_PIECE = 2**18  # numbers per task promoted to float64 at a time


def each_layer(task_vectors: TaskVectors, change: Callable[[str, Tensor], Tensor]) -> TaskVectors:
    """`change(name, τ)` of every layer, kept as the given task vectors are.

    Args:
        task_vectors: left unchanged.
        change: of a layer's name and dense τ `[T, *shape]`, which it must not change in place;
            gives the new τ of the same shape. One layer is in memory at a time.
    """
    pairs = ((name, change(name, tau)) for name, tau in task_vectors.deltas.items())
    return task_vectors.with_deltas(pairs)


def spread(per_task: Tensor, tau: Tensor) -> Tensor:
    """`[T]` as a tensor that multiplies τ `[T, *shape]`, in its type and place."""
    return per_task.to(tau).view(-1, *[1] * (tau.ndim - 1))


def products(vectors: Tensor) -> Tensor:
    """`⟨v_i, v_j⟩` of `[T, *shape]`: `[T, T]`, summed in float64, on the CPU."""
    flat = vectors.reshape(len(vectors), -1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for piece in flat.split(_PIECE, dim=1):
        wide = piece.double()
        total += wide @ wide.T
    return total.cpu()


def check_number(
    transform: str,
    name: str,
    value: float,
    low: float,
    high: float,
    open_low: bool = False,
    whole: bool = False,
) -> None:
    """Raises AdamergeError unless `value` is a (whole) number in [low, high], or in (low, high]."""
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise AdamergeError(
            f"{transform}: {name} is {value!r}, expected a {'whole ' if whole else ''}number in "
            f"{bracket}{low:g}, {high:g}]"
        )
