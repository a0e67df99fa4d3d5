"""Transforms that keep some directions of every matrix and take others away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.transforms.layers import check_number, each_layer
from adamerge.transforms.matrices import (
    Change,
    Device,
    Layers,
    decomposed,
    each_matrix,
    on_matrices,
    scaled,
    smaller_side,
)
from adamerge.weights.task_vectors import TaskVectors


def centre(task_vectors: TaskVectors) -> TaskVectors:
    """What tells the experts from their mean: `θ0 + m` in place of θ0 and `τ_t − m`, m = Σ τ_t / T.

    The first half of CART (arXiv 2412.12153), for all layers. Coefficients that are equal for all
    tasks give the mean of the experts, whatever they are; as a start of learning they are 1 and
    more.

    Args:
        task_vectors: left unchanged.

    Raises:
        AdamergeError: there is one task alone.

    >>> experts = {"a": {"w": torch.tensor([1.0, 4.0])}, "b": {"w": torch.tensor([3.0, 0.0])}}
    >>> centred = centre(TaskVectors({"w": torch.zeros(2)}, experts))
    >>> centred.pretrained["w"], centred.deltas["w"][0]
    (tensor([2., 2.]), tensor([-1.,  2.]))
    """
    return _centred(task_vectors, lambda _, tau: tau)


def truncate(
    task_vectors: TaskVectors, rank: float = 0.16, layers: Layers = "blocks", device: Device = None
) -> TaskVectors:
    """The largest singular triplets of every matrix of every task vector; other layers whole.

    Keeps the first max(1, ⌊rank · r⌋) of the r triplets of a matrix. A cleaned set: its init is
    that of the task vectors given. One decomposition per matrix and task.

    Args:
        task_vectors: left unchanged.
        rank: the share of triplets to keep, in (0, 1].
        layers: `matrices` (all of two dimensions) or `blocks` (those of the blocks alone).
        device: that computes.

    Raises:
        AdamergeError: `rank` is out of range.
    """
    return each_layer(task_vectors, _truncation("truncate", task_vectors, rank, layers, device))


def cart(
    task_vectors: TaskVectors, rank: float = 0.16, layers: Layers = "blocks", device: Device = None
) -> TaskVectors:
    """The mean of the experts, and what tells each from it with few singular triplets.

    Revisiting Weight Averaging for Model Merging (CART, arXiv 2412.12153): `truncate` of `centre`,
    so that `θ0 + m + λ Σ_t trunc(τ_t − m)` is merged. Layers that are not truncated are merged to
    the mean by equal coefficients. Its init is a number above 1 that the authors choose by the
    suite: 1.5 … 3 (2.3 for ViT-B/32 and 8 tasks). One decomposition per matrix and task.

    Args:
        task_vectors: left unchanged.
        rank: the share of triplets to keep, in (0, 1]: 0.08 in the paper, 0.16 in later code.
        layers: `blocks` (the matrices of the blocks alone) or `matrices` (all of two dimensions).
        device: that computes.

    Raises:
        AdamergeError: `rank` is out of range, or there is one task alone.
    """
    return _centred(task_vectors, _truncation("cart", task_vectors, rank, layers, device))


def twin(
    task_vectors: TaskVectors,
    scale: float = 0.3,
    rank: float = 0.16,
    layers: Layers = "blocks",
    device: Device = None,
) -> TaskVectors:
    """A shared merge, and with few singular triplets what tells each expert from it:
    `s + trunc(τ_t − s)` with `s = scale · Σ_k τ_k`.

    The parts of Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging
    (arXiv 2406.15479), put together for images whose task is known: every task has an encoder of
    its own, init 1, where the paper weighs the parts by a router learned with labels. Layers that
    are not truncated are the expert's. One decomposition per matrix and task.

    Args:
        task_vectors: left unchanged.
        scale: the coefficient of the shared merge.
        rank: the share of triplets to keep, in (0, 1].
        layers: `blocks` (the matrices of the blocks alone) or `matrices` (all of two dimensions).
        device: that computes.

    Raises:
        AdamergeError: `scale` or `rank` is out of range.
    """
    check_number("twin", "scale", scale, 0, 10)
    truncated = _truncation("twin", task_vectors, rank, layers, device)

    def change(name: str, tau: Tensor) -> Tensor:
        shared = scale * tau.sum(0)
        return shared + truncated(name, tau - shared)

    other = each_layer(task_vectors, change)
    other.per_task = True
    return other


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


def _centred(task_vectors: TaskVectors, change: Change) -> TaskVectors:
    """`centre`, with a change of what it gives before that is kept."""
    if len(task_vectors.tasks) < 2:
        raise AdamergeError(
            f"{task_vectors.tasks[0]} is the only task, and nothing tells it from the mean of all: "
            "merge at least two, or take away the transform that centres them (centre, cart)"
        )
    means: dict[str, Tensor] = {}

    def pairs() -> Iterator[tuple[str, Tensor]]:
        for name, tau in task_vectors.deltas.items():
            means[name] = tau.mean(0)
            yield name, change(name, tau - means[name])

    other = task_vectors.with_deltas(pairs())
    other.pretrained = {name: base + means[name] for name, base in task_vectors.pretrained.items()}
    return other


def _truncation(
    who: str, task_vectors: TaskVectors, rank: float, layers: Layers, device: Device
) -> Change:
    """The change of layers that `truncate` makes."""
    check_number(who, "rank", rank, 0, 1, open_low=True)

    def change(name: str, tau: Tensor) -> Tensor:
        kept = torch.arange(min(tau.shape[1:]), device=tau.device)
        kept = (kept < max(1, int(rank * len(kept)))).double()
        exact = tau.dtype == torch.float64
        return torch.stack([scaled(m, smaller_side(m, exact)[1], kept) for m in tau])

    return on_matrices(task_vectors, change, layers, device, 1.0)


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
