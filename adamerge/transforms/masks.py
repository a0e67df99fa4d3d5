"""Transforms that decide, entry by entry, which tasks have a say: signs, winners, masks."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.transforms.layers import check_number, each_layer, spread
from adamerge.weights.task_vectors import TaskVectors


def elect(task_vectors: TaskVectors) -> TaskVectors:
    """The entries that agree with the sign of the sum, shared by those that do: the vectors' sum is
    `Σ_t τ_t a_t / Σ_t a_t` with `a_t = 1[sign τ_t = sign Σ_k τ_k]`.

    Election and disjoint mean of TIES-Merging: Resolving Interference When Merging Models
    (arXiv 2306.01708), which DELLA and others take over: use it after a transform that makes
    vectors sparse. An entry whose sum is 0 becomes 0. The sum is the whole merge: init 1. All
    layers take part.
    """

    def change(_: str, tau: Tensor) -> Tensor:
        agree = (tau.sign() == tau.sum(0).sign()) & (tau != 0)
        return tau * agree / agree.sum(0).clamp_min(1)

    return each_layer(task_vectors, change)


def magmax(task_vectors: TaskVectors) -> TaskVectors:
    """Of every entry the one of largest magnitude: `τ_t · 1[|τ_t| = max_k |τ_k|]`.

    MagMax: Leveraging Model Merging for Seamless Continual Learning (arXiv 2407.06322). Of equal
    magnitudes the later task's. The vectors are cleaned, not merged: init 0.5. All layers take
    part.
    """

    def change(_: str, tau: Tensor) -> Tensor:
        largest, winner = tau[0].abs(), torch.zeros_like(tau[0], dtype=torch.int64)
        for row in range(1, len(tau)):
            magnitude = tau[row].abs()
            winner[magnitude >= largest] = row
            largest = torch.maximum(largest, magnitude)
        rows = torch.arange(len(tau), device=tau.device)
        return tau * (winner == rows.view(-1, *[1] * (tau.ndim - 1)))

    return each_layer(task_vectors, change)


def consensus(task_vectors: TaskVectors, threshold: float = 0.4, at_least: int = 2) -> TaskVectors:
    """The entries that several tasks need: `τ_t · 1[Σ_k m_k ≥ at_least]`, with the masks
    `m_k = 1[|τ_k| > threshold · |Σ_j τ_j − τ_k|]`.

    Consensus Merging of Localizing Task Information for Improved Model Merging and Compression
    (arXiv 2405.07813). The vectors are cleaned, not merged: init 0.5. All layers take part.

    Args:
        task_vectors: left unchanged.
        threshold: λ of the masks; the paper chooses it per task, on labeled data.
        at_least: tasks that must need an entry, 1 to T.

    Raises:
        AdamergeError: a number is out of range.
    """
    check_number("consensus", "threshold", threshold, 0, 10)
    check_number("consensus", "at_least", at_least, 1, len(task_vectors.tasks), whole=True)

    def change(_: str, tau: Tensor) -> Tensor:
        return tau * (_needed(tau, tau.sum(0), threshold).sum(0) >= at_least)

    return each_layer(task_vectors, change)


def tall(task_vectors: TaskVectors, threshold: float = 0.4) -> TaskVectors:
    """Of the sum of all task vectors what each task needs:
    `1[|τ_t| > threshold · |Σ_j τ_j − τ_t|] · Σ_j τ_j`.

    TALL masks of Localizing Task Information for Improved Model Merging and Compression
    (arXiv 2405.07813). Every task has an encoder of its own, `θ0 + λ_t` times its vector: init 1.
    All layers take part.

    Args:
        task_vectors: left unchanged.
        threshold: λ of the masks; the paper chooses it per task, on labeled data.

    Raises:
        AdamergeError: `threshold` is out of range.
    """
    check_number("tall", "threshold", threshold, 0, 10)

    def change(_: str, tau: Tensor) -> Tensor:
        total = tau.sum(0)
        return _needed(tau, total, threshold) * total

    return _one_encoder_each(each_layer(task_vectors, change))


def emr(task_vectors: TaskVectors, by_layers: bool = False) -> TaskVectors:
    """Of one unified vector u the entries with each task's sign, scaled to its size:
    `s_t · 1[τ_t u > 0] · u`.

    EMR-Merging: Tuning-Free High-Performance Model Merging (arXiv 2405.17461). u has the sign of
    the sum (of 0: minus) and the largest magnitude of that sign;
    `s_t = Σ|τ_t| / Σ|1[τ_t u > 0] u|` over all entries. Every task has an encoder of its own,
    `θ0 + λ_t` times its vector: init 1. All layers take part.

    Args:
        task_vectors: left unchanged.
        by_layers: sums of the layers' means in s, as in the authors' code, not of all entries.

    Raises:
        AdamergeError: nothing of a task has the unified sign.
    """
    sizes = torch.zeros(2, len(task_vectors.tasks), dtype=torch.float64)
    for tau in task_vectors.deltas.values():
        own = torch.stack([tau, _of_own_sign(tau)]).abs_().reshape(2, len(tau), -1)
        sizes += (own.mean(2) if by_layers else own.sum(2)).double().cpu()
    if bool((sizes[1] == 0).any()):
        task = task_vectors.tasks[int((sizes[1] == 0).nonzero()[0])]
        raise AdamergeError(
            f"emr: no entry of task {task!r} has the sign of the sum of all task vectors: leave "
            "that task out, or use another transform"
        )
    scales = sizes[0] / sizes[1]
    changed = each_layer(task_vectors, lambda _, tau: _of_own_sign(tau) * spread(scales, tau))
    return _one_encoder_each(changed)


def _needed(tau: Tensor, total: Tensor, threshold: float) -> Tensor:
    return tau.abs() > threshold * (total - tau).abs()


def _of_own_sign(tau: Tensor) -> Tensor:
    """The unified vector where each task's entry has its sign, `[T, *shape]`; else 0."""
    positive = tau.sum(0) > 0
    agree = torch.where(positive, tau, -tau) > 0
    largest = (tau.abs() * agree).amax(0)
    return agree * torch.where(positive, largest, -largest)


def _one_encoder_each(task_vectors: TaskVectors) -> TaskVectors:
    task_vectors.per_task = True
    return task_vectors
