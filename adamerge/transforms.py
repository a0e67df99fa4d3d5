"""Transforms: `TaskVectors -> TaskVectors`, applied once, before a method sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.errors import AdamergeError
from adamerge.task_vectors import TaskVectors


def ties(task_vectors: TaskVectors, density: float = 0.2) -> TaskVectors:
    """Trim and sign-elected task vectors, one per task: the "++" of AdaMerging++.

    TIES-Merging: Resolving Interference When Merging Models (arXiv 2306.01708), without its last
    sum. Per expert, over its whole vector of P entries, keep those at or above the magnitude that
    `P − floor(density · P)` entries do not exceed; elect a sign per entry from the sum of the
    trimmed vectors (a zero sum takes the sign of the sum of all elected signs); drop the entries
    that disagree.

    Args:
        task_vectors: the experts' task vectors; left unchanged.
        density: fraction of entries to keep before the election, in (0, 1].

    Raises:
        AdamergeError: `density` is out of range.
    """
    if not 0 < density <= 1:
        raise AdamergeError(f"ties: density is {density}, expected a fraction in (0, 1], like 0.2")
    thresholds = _trim_thresholds(task_vectors, density)
    trimmed = {name: _trim(delta, thresholds) for name, delta in task_vectors.deltas.items()}
    signs = {name: delta.sum(0).sign_() for name, delta in trimmed.items()}
    balance = torch.stack([sign.sum(dtype=torch.float64) for sign in signs.values()]).sum().sign()
    for name, delta in trimmed.items():
        sign = torch.where(signs[name] == 0, balance.to(signs[name].dtype), signs[name])
        delta.mul_(delta.sign() == sign)
    return task_vectors.with_deltas(trimmed)


def _trim_thresholds(task_vectors: TaskVectors, density: float) -> Tensor:
    """The smallest magnitude each task keeps, `[T]`; one task's magnitudes in memory at a time."""
    total = task_vectors.numel()
    rank = max(1, total - int(density * total))
    thresholds = []
    for row in range(len(task_vectors.tasks)):
        vector = torch.cat([delta[row].flatten() for delta in task_vectors.deltas.values()])
        thresholds.append(vector.abs_().kthvalue(rank).values)
    return torch.stack(thresholds)


def _trim(delta: Tensor, thresholds: Tensor) -> Tensor:
    per_task = thresholds.view(-1, *[1] * (delta.ndim - 1))
    return delta * (delta.abs() >= per_task)
