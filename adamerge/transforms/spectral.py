"""Transforms by the singular values and vectors of every matrix's task vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.transforms.layers import check_number
from adamerge.transforms.matrices import (
    Device,
    Layers,
    decomposed,
    each_matrix,
    is_tall,
    polar,
    reciprocal,
    scaled,
    smaller_side,
)
from adamerge.weights.task_vectors import TaskVectors


def tsv_m(
    task_vectors: TaskVectors, layers: Layers = "matrices", device: Device = None
) -> TaskVectors:
    """Every task's largest singular triplets, made orthogonal to those of the other tasks.

    TSV-Merge of Task Singular Vectors: Reducing Task Interference in Model Merging
    (arXiv 2412.00081). With r the smaller side of a matrix and k = ⌊r / T⌋, the first k triplets of
    all τ_t stand side by side in `U [rows, T k]`, `S` and `V`; task t gets `U⊥_t diag(S_t) V⊥_tᵀ`
    of its columns, where `X⊥ = P Qᵀ` for `X = P D Qᵀ`. Other layers get `τ_t / T`. The sum is the
    whole merge: init 1.

    One decomposition per matrix and task, and two of all side by side.

    Args:
        task_vectors: left unchanged.
        layers: `matrices` (all of two dimensions) or `blocks` (those of the blocks alone).
        device: that computes.

    Raises:
        AdamergeError: more tasks than a matrix has directions.

    >>> experts = {"a": {"w": torch.diag(torch.tensor([3.0, 0.0]))}}
    >>> experts["b"] = {"w": torch.diag(torch.tensor([0.0, 1.0]))}
    >>> vectors = TaskVectors({"w": torch.zeros(2, 2)}, experts)
    >>> tsv_m(vectors).deltas["w"].sum(0)
    tensor([[3., 0.],
            [0., 1.]])
    """
    return each_matrix(task_vectors, _tsv, layers, device)


def iso_c(
    task_vectors: TaskVectors, layers: Layers = "matrices", device: Device = None
) -> TaskVectors:
    """All directions of the summed task vectors equally strong.

    Iso-C of No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces
    (arXiv 2502.04959). With `Σ_t τ_t = U S Vᵀ` of a matrix and s̄ the mean of S, the merge is
    `s̄ U Vᵀ`; task t's share of it is `τ_t V (s̄ / S) Vᵀ`, of a wide matrix `U (s̄ / S) Uᵀ τ_t`. Other
    layers get `τ_t / T`. The sum is the whole merge: init 1 (the paper searches the best factor on
    labeled images; 1.5 for ViT-B/32 is common). One decomposition per matrix.

    Args:
        task_vectors: left unchanged.
        layers: `matrices` (all of two dimensions) or `blocks` (those of the blocks alone).
        device: that computes.

    >>> experts = {"a": {"w": torch.diag(torch.tensor([3.0, 0.0]))}}
    >>> experts["b"] = {"w": torch.diag(torch.tensor([0.0, 1.0]))}
    >>> vectors = TaskVectors({"w": torch.zeros(2, 2)}, experts)
    >>> iso_c(vectors).deltas["w"].sum(0)
    tensor([[2., 0.],
            [0., 2.]])
    """
    return each_matrix(task_vectors, _iso, layers, device)


def iso_cts(
    task_vectors: TaskVectors,
    common: float = 0.8,
    layers: Layers = "matrices",
    device: Device = None,
) -> TaskVectors:
    """As `iso_c`, with the weakest common directions replaced by the tasks' own.

    Iso-CTS of No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces
    (arXiv 2502.04959). Of a matrix with r directions n = round((r − ⌊common · r⌋) / T) go to each
    task and c = r − T n stay: the first c triplets of `Σ_t τ_t` and the first n of every
    `τ_t − U_c U_cᵀ τ_t`, side by side, are made orthogonal as in `tsv_m`, and all get the mean of
    their singular values, s̄. Task t's share is `s̄ (τ_t V_c / S_c) V⊥_cᵀ + s̄ U⊥_t V⊥_tᵀ`. Other
    layers get `τ_t / T`. The sum is the whole merge: init 1. Where rounding leaves n = 0, it is
    that of `iso_c`.

    A decomposition per matrix, one per matrix and task, and two of all side by side.

    Args:
        task_vectors: left unchanged.
        common: the share of directions that is common, in [0, 1].
        layers: `matrices` (all of two dimensions) or `blocks` (those of the blocks alone).
        device: that computes.

    Raises:
        AdamergeError: `common` is out of range.
    """
    check_number("iso_cts", "common", common, 0, 1)
    return each_matrix(task_vectors, lambda _, tau: _iso_parts(tau, common), layers, device)


def svc(
    task_vectors: TaskVectors,
    alpha: float = 0.1,
    scale: float = 1.0,
    layers: Layers = "matrices",
    experts: TaskVectors | None = None,
    device: Device = None,
) -> TaskVectors:
    """A merge whose singular values are lowered where several tasks count the same direction.

    Singular value calibration of When Shared Knowledge Hurts: Spectral Over-Accumulation in Model
    Merging (arXiv 2602.05536), of the merge that the given task vectors are: of nothing (task
    arithmetic), or of a transform before. Of a matrix, let `M = U S Vᵀ` be `scale` times their sum,
    and `a = u_rᵀ M`, `a_t = u_rᵀ τ_t` for direction r and the experts' own τ: its singular value is
    multiplied by `T / Σ_t max(alpha, a·a_t / a_t·a_t)`, where a task without a part in it counts
    alpha. The given vectors are scaled likewise, on the smaller side of the matrix; other layers
    get `scale` alone. The sum, `scale` and all, is the whole merge: init 1. One decomposition per
    matrix.

    Args:
        task_vectors: left unchanged.
        alpha: the least that a task counts, above 0: 0.1 for task arithmetic, 1 for `tsv_m`.
        scale: 0.3 for task arithmetic; 1 for what is a whole merge before.
        layers: `matrices` (all of two dimensions) or `blocks` (those of the blocks alone).
        experts: the experts' own task vectors, which a run supplies; None: the given ones are.
        device: that computes.

    Raises:
        AdamergeError: `alpha` is not above 0, or the experts are of other tasks.
    """
    check_number("svc", "alpha", alpha, 0, 10**6, open_low=True)
    check_number("svc", "scale", scale, -(10**6), 10**6)
    own = experts or task_vectors
    if own.tasks != task_vectors.tasks:
        raise AdamergeError(
            f"svc: the experts are of the tasks {', '.join(own.tasks)}, expected "
            f"{', '.join(task_vectors.tasks)}"
        )

    def change(name: str, shares: Tensor) -> Tensor:
        tau = shares if own is task_vectors else own.deltas[name].to(shares)
        return _calibrated(tau, scale * shares, alpha)

    return each_matrix(task_vectors, change, layers, device, scale)


def _tsv(name: str, tau: Tensor) -> Tensor:
    """The shares of TSV-M in one matrix."""
    if min(tau.shape[1:]) < len(tau):
        raise AdamergeError(
            f"tsv_m: the layer {name!r} of shape {list(tau.shape[1:])} has fewer directions than "
            f"there are tasks ({len(tau)}), so that none is left for a task: set layers to blocks, "
            "or merge fewer tasks"
        )
    exact, count = tau.dtype == torch.float64, min(tau.shape[1:]) // len(tau)
    triplets = [decomposed(matrix, exact, count) for matrix in tau]
    lefts, rights = _orthogonal(triplets, exact)
    strengths = [values for _, values, _ in triplets]
    return torch.stack([(u * s) @ v.T for u, s, v in zip(lefts, strengths, rights, strict=True)])


def _iso(_: str, tau: Tensor) -> Tensor:
    """The shares of Iso-C in one matrix."""
    values, basis = smaller_side(tau.double().sum(0), tau.dtype == torch.float64)
    return scaled(tau, basis, values.mean() * reciprocal(values))


def _iso_parts(tau: Tensor, common: float) -> Tensor:
    """The shares of Iso-CTS in one matrix."""
    exact, tasks = tau.dtype == torch.float64, len(tau)
    first, own = directions(min(tau.shape[1:]), tasks, common)
    tau = tau.double()
    left, values, right = decomposed(tau.sum(0), exact, first)
    triplets = [(left, values, right)]
    for matrix in tau:  # what is left of a task that the common directions span is rounding
        rest = matrix - left @ (left.T @ matrix)
        triplets.append(decomposed(rest, exact, own, float(torch.linalg.norm(matrix))))
    lefts, rights = _orthogonal(triplets, exact)
    mean = torch.cat([s for _, s, _ in triplets]).mean()
    shared = (right * reciprocal(values)) @ rights[0].T
    return mean * torch.stack(
        [m @ shared + u @ v.T for m, u, v in zip(tau, lefts[1:], rights[1:], strict=True)]
    )


def directions(rank: int, tasks: int, common: float) -> tuple[int, int]:
    """How many of a matrix's `rank` directions `iso_cts` leaves to all tasks, and gives to each."""
    own = min(round((rank - math.floor(common * rank)) / tasks), rank // tasks)
    return rank - own * tasks, own


def _orthogonal(
    triplets: list[tuple[Tensor, Tensor, Tensor]], exact: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The singular vectors of several matrices, made orthogonal all together."""
    lefts, values, rights = zip(*triplets, strict=True)
    counts = [len(own) for own in values]
    left, right = (polar(torch.cat(vectors, 1), exact) for vectors in (lefts, rights))
    return list(left.split(counts, 1)), list(right.split(counts, 1))


def _calibrated(tau: Tensor, shares: Tensor, alpha: float) -> Tensor:
    """The shares of a merge in one matrix, its over-counted directions lowered."""
    exact, tasks = tau.dtype == torch.float64, len(tau)
    merged = shares.double().sum(0)
    left, values, right = decomposed(merged, exact)
    along = left.T @ merged  # [r, columns]
    total = torch.zeros_like(values)
    rounding = (len(values) * torch.finfo(tau.dtype).eps) ** 2
    for matrix in tau.double():
        own = left.T @ matrix
        strength = own.square().sum(1)
        strength = torch.where(strength > rounding * strength.sum(), strength, 0)
        total += ((along * own).sum(1) * reciprocal(strength)).clamp_min(alpha)
    factors = torch.where(values > 0, tasks / total, 1)
    return scaled(shares, right if is_tall(merged) else left, factors)
