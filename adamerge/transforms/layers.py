"""Task vectors changed one layer at a time: what transforms share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from adamerge.weights.task_vectors import TaskVectors


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
