"""Transforms: `TaskVectors -> TaskVectors`, applied once, before a method sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.weights.task_vectors import TaskVectors


def ties(
    task_vectors: TaskVectors,
    density: float | Mapping[str, float] = 0.2,
    architecture: Sequence[str] = (),
) -> TaskVectors:
    """Trim and sign-elected task vectors, one per task: the "++" of AdaMerging++.

    TIES-Merging: Resolving Interference When Merging Models (arXiv 2306.01708), without its last
    sum. Per expert, over its whole vector of P entries, keep those at or above the magnitude that
    `P − floor(density · P)` entries do not exceed; elect a sign per entry from the sum of the
    trimmed vectors (a zero sum takes the sign of the sum of all elected signs); drop the entries
    that disagree.

    Args:
        task_vectors: the experts' task vectors; left unchanged.
        density: fraction of entries to keep before the election, in (0, 1]; or one for every
            open_clip name of an architecture, and a `default`.
        architecture: the names that the task vectors' architecture has in open_clip.

    Raises:
        AdamergeError: `density` is out of range, or there is none for this architecture.
    """
    density = _of_architecture(density, architecture)
    if not 0 < density <= 1:
        raise AdamergeError(f"ties: density is {density}, expected a fraction in (0, 1], like 0.2")
    thresholds = _trim_thresholds(task_vectors, density)
    signs = {name: trimmed.sum(0).sign_() for name, trimmed in _trimmed(task_vectors, thresholds)}
    balance = torch.stack([sign.sum(dtype=torch.float64) for sign in signs.values()]).sum().sign()
    return task_vectors.with_deltas(_agreeing(task_vectors, thresholds, signs, balance))


def _of_architecture(density: float | Mapping[str, float], names: Sequence[str]) -> float:
    if not isinstance(density, Mapping):
        return density
    named = [name for name in (*names, "default") if name in density]
    if not named or not isinstance(density[named[0]], int | float):
        raise AdamergeError(
            f"ties: density is {dict(density)!r}, expected a number for "
            f"{names[0] if names else 'this architecture'} or for default"
        )
    return float(density[named[0]])


def _trim_thresholds(task_vectors: TaskVectors, density: float) -> Tensor:
    """The smallest magnitude each task keeps, `[T]`; one task's magnitudes in memory at a time."""
    total = task_vectors.numel()
    rank = max(1, total - int(density * total))
    thresholds = []
    for row in range(len(task_vectors.tasks)):
        parts = ((task_vectors.layers[n], base) for n, base in task_vectors.pretrained.items())
        vector = torch.cat([layer.row(row, base).flatten() for layer, base in parts])
        thresholds.append(vector.abs_().kthvalue(rank).values)
    return torch.stack(thresholds)


def _trimmed(task_vectors: TaskVectors, thresholds: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every layer in turn, `[T, *shape]`: made twice, so that one is in memory at a time."""
    for name, delta in task_vectors.deltas.items():
        yield name, _trim(delta, thresholds)


def _agreeing(
    task_vectors: TaskVectors, thresholds: Tensor, signs: dict[str, Tensor], balance: Tensor
) -> Iterator[tuple[str, Tensor]]:
    for name, trimmed in _trimmed(task_vectors, thresholds):
        sign = torch.where(signs[name] == 0, balance.to(signs[name].dtype), signs[name])
        yield name, trimmed.mul_(trimmed.sign() == sign)


def _trim(delta: Tensor, thresholds: Tensor) -> Tensor:
    per_task = thresholds.view(-1, *[1] * (delta.ndim - 1))
    return delta * (delta.abs() >= per_task)
