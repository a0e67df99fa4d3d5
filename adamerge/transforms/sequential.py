"""Transforms that take one task after the other, and clear each of what those before it hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.transforms.layers import check_number, each_layer
from adamerge.transforms.matrices import Device, Layers, decomposed, each_matrix
from adamerge.weights.task_vectors import TaskVectors


def opcm(
    task_vectors: TaskVectors,
    alpha: float = 0.5,
    order: Sequence[str] | None = None,
    layers: Layers = "blocks",
    device: Device = None,
) -> TaskVectors:
    """Every task vector without what lies along the task vectors merged before it.

    OPCM of Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable
    Continual Model Merging (arXiv 2501.09522). In a matrix, let `U S Vᵀ` be the sum of the cleaned
    task vectors so far and s the first index at which the values up to it make up more than `alpha`
    of the sum of S: of `Uᵀ τ_t V` the leading s × s entries and the diagonal are taken away. Other
    layers are added as they are. The sum of all is scaled to the mean norm of the experts' task
    vectors; each share is a cleaned one by that factor. The sum is the whole merge: init 1. What
    the first tasks of the order give does not depend on those that come later, up to that factor.

    One decomposition per matrix and task but the first.

    Args:
        task_vectors: left unchanged.
        alpha: in [0, 1]; the more, the more of a task vector is taken away.
        order: of the tasks, all of them; None: as given.
        layers: `blocks` (the matrices of the blocks alone) or `matrices` (all of two dimensions).
        device: that computes.

    Raises:
        AdamergeError: `alpha` is out of range, or `order` is not one of these tasks.
    """
    check_number("opcm", "alpha", alpha, 0, 1)
    wanted = list(task_vectors.tasks if order is None else order)
    if sorted(wanted) != sorted(task_vectors.tasks):
        raise AdamergeError(
            f"opcm: order is {wanted}, expected every task once: {', '.join(task_vectors.tasks)}"
        )
    rows = [task_vectors.index(task) for task in wanted]
    cleaned = each_matrix(
        task_vectors, lambda _, tau: _cleaned(tau, rows, alpha), layers, device, 1.0
    )
    squares = sum(float(tau.double().sum(0).square().sum()) for tau in cleaned.deltas.values())
    factor = float(task_vectors.norms().mean()) / squares**0.5
    return each_layer(cleaned, lambda _, tau: tau * factor)


def _cleaned(tau: Tensor, rows: list[int], alpha: float) -> Tensor:
    """τ of one matrix, each row of it without what lies along those before it, float64."""
    exact, found = tau.dtype == torch.float64, tau.to(torch.float64, copy=True)
    merged = found[rows[0]].clone()
    for row in rows[1:]:
        left, values, right = decomposed(merged, exact)
        passed = (values.cumsum(0) / values.sum() > alpha).nonzero()
        first = int(passed[0]) if len(passed) else len(values)
        across = left.T @ found[row] @ right
        taken = torch.diag(across.diagonal())
        taken[:first, :first] = across[:first, :first]
        found[row] -= left @ taken @ right.T
        merged += found[row]
    return found
