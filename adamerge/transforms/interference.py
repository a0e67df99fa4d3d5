"""Transforms that look for merged matrices in which the tasks disturb each other least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.transforms.layers import check_number
from adamerge.transforms.matrices import (
    Device,
    Layers,
    decomposed,
    each_matrix,
    matrices_of,
    reciprocal,
)
from adamerge.weights.task_vectors import TaskVectors

_MOST = 10**6  # of a setting
_LEAST = 5e-4  # of the largest trace: tasks below it take no part in ACE's matrix


def wudi(
    task_vectors: TaskVectors,
    steps: int = 300,
    lr: float = 1e-5,
    layers: Layers = "matrices",
    others: Literal["mean", "pretrained"] = "mean",
    device: Device = None,
) -> TaskVectors:
    """A merged matrix a few steps from the sum, so that no task is disturbed along itself.

    WUDI-Merging of Whoever Started the Interference Should End It: Guiding Data-Free Model Merging
    via Task Vectors (arXiv 2503.08099). From `Δ = Σ_t τ_t`, Adam takes `steps` steps down
    `Σ_t ‖(Δ − τ_t) τ_tᵀ‖² / ‖τ_t‖²`, every matrix on its own. Task t's share is
    `τ_t + (Δ − Σ_k τ_k) / T`. The sum is the whole merge: init 1. Stopping early is part of the
    method, so that more steps or a larger lr give another merge.

    Every step is one product of Δ with a square matrix of its columns: for ViT-B/32 a quarter of
    an hour on one core.

    Args:
        task_vectors: left unchanged.
        steps: 300 in the authors' function; the table of FusionBench is of 400.
        lr: the learning rate of Adam, whose step moves every entry by about as much: 300 of 1e-5
            move none by more than 3e-3, which is far for task vectors of large CLIPs and little
            for those of small models, whose merge stays near the sum unless lr grows with them.
        layers: `matrices` (all of two dimensions) or `blocks` (those of the blocks alone, as the
            authors).
        others: what all other layers become: the `mean` of the experts, or as `pretrained` (as the
            authors).
        device: that computes.

    Raises:
        AdamergeError: a setting out of range.
    """
    _check_steps("wudi", steps, lr)
    if others not in ("mean", "pretrained"):
        raise AdamergeError(f"wudi: others is {others!r}, expected 'mean' or 'pretrained'")

    def change(name: str, tau: Tensor) -> Tensor:
        total = tau.sum(0)
        gram, pull = tau.new_zeros(tau.shape[2], tau.shape[2]), torch.zeros_like(total)
        for own, weight in zip(tau, reciprocal(tau.flatten(1).square().sum(1)), strict=True):
            part = weight * own.T @ own
            gram += part
            pull += own @ part
        found = _descended(total, lambda merged: 2 * (merged @ gram - pull), steps, lr)
        return tau + (found - total) / len(tau)

    return each_matrix(task_vectors, change, layers, device, None if others == "mean" else 0.0)


def ace(
    task_vectors: TaskVectors,
    epsilon: float = 1e-2,
    spread: float = 0.3,
    rank: float = 0.3,
    layers: Layers = "matrices",
    device: Device = None,
) -> TaskVectors:
    """A closed form whose input covariances are estimated by the task vectors themselves.

    ACE-Merging: Data-Free Model Merging with Adaptive Covariance Estimation (arXiv 2603.02945), as
    in its authors' code. Of a matrix, c_t is τ_t less the mean of its rows, `C_t = c_tᵀ c_t` and
    `C̃_t = C_t + epsilon`; where the tasks differ much in size, both are divided by tr C_t. Task
    t's share is `A_t = c_t C̃_t (Σ_k C̃_k + P)⁻¹`, with the mean row of `Σ_k C_k` in every row of P.

    Where the tasks differ much, P is divided by the mean ‖τ_t‖², and with
    `F_t = A_t + τ_t (C_t − Σ_k C̃_k / T)`, `Σ_t F_t = U S Vᵀ` and s̄ the mean of its first
    k = rank · r singular values the share is `A_t + s̄ F_t V_k S_k⁻¹ V_kᵀ`, so that `s̄ U_k V_kᵀ` is
    added in sum.

    Then a task whose tr C_t is below 5e-4 of the largest takes no part in that matrix, and
    its share is 0: the formula divides by tr C_t, and the authors' code has no bound there.

    Other layers get `τ_t / T`. The sum is the whole merge: init 1. No step is taken: a solution per
    matrix, and where the tasks differ much a decomposition.

    Args:
        task_vectors: left unchanged.
        epsilon: the ridge of every task.
        spread: tasks differ much where the variance of log ‖τ_t‖² exceeds this times their squared
            mean.
        rank: the share of singular triplets that the last term keeps, in (0, 1].
        layers: `matrices` (all of two dimensions) or `blocks` (those of the blocks alone).
        device: that computes.

    Raises:
        AdamergeError: a setting out of range.
    """
    check_number("ace", "epsilon", epsilon, 0, _MOST, open_low=True)
    check_number("ace", "spread", spread, 0, _MOST)
    check_number("ace", "rank", rank, 0, 1, open_low=True)

    def change(name: str, tau: Tensor) -> Tensor:
        return _estimated(tau, epsilon, spread, rank)

    return each_matrix(task_vectors, change, layers, device)


def doge(
    task_vectors: TaskVectors,
    scale: float = 0.07,
    subspace: int = 6,
    density: float = 0.3,
    steps: int = 400,
    lr: float = 1e-4,
    layers: Layers = "blocks",
    device: Device = None,
) -> TaskVectors:
    """Task vectors moved together out of each other's way, outside the directions they share.

    DOGE TA of Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent
    (arXiv 2501.01230). In a matrix, `λ_t = scale / ‖τ_t‖`, and a change δ that all tasks have in
    common takes `steps` steps of Adam from 0 down
    `Σ_j Σ_rows (Σ_columns τ_j ∘ (τ_j − Σ_t λ_t (τ_t + δ)))²`, its gradient g replaced by
    `g − B Bᵀ g`, where B are the first ⌊r / subspace⌋ left singular vectors of those that `tsv_m`
    puts side by side. Task t's share is `λ_t (τ_t + δ)` at the largest `density` of the entries of
    its own task vector (over all matrices that take part), 0 elsewhere; all other layers stay as
    pretrained. The sum is the whole merge: init 1; learning on top from there is DOGE AM.

    A decomposition per matrix and task, and steps that each read all task vectors of a matrix
    twice: for ViT-B/32 and 8 tasks a quarter of an hour on one core.

    Args:
        task_vectors: left unchanged.
        scale: of the coefficients.
        subspace: one direction of so many is shared, and not changed by δ.
        density: the share of entries to keep, in (0, 1].
        steps: of Adam.
        lr: its learning rate.
        layers: `blocks` (the matrices of the blocks alone) or `matrices` (all of two dimensions).
        device: that computes.

    Raises:
        AdamergeError: a setting out of range.
    """
    _check_steps("doge", steps, lr)
    check_number("doge", "scale", scale, 0, _MOST)
    check_number("doge", "subspace", subspace, 1, _MOST, whole=True)
    check_number("doge", "density", density, 0, 1, open_low=True)
    thresholds = _thresholds(task_vectors, density, layers)

    def change(name: str, tau: Tensor) -> Tensor:
        factors = scale * reciprocal(tau.flatten(1).norm(dim=1))[:, None, None]
        moved = tau + _moved(tau, factors, subspace, steps, lr)
        return factors * moved * (tau.abs() >= thresholds.to(tau)[:, None, None])

    return each_matrix(task_vectors, change, layers, device, 0.0)


def _check_steps(name: str, steps: int, lr: float) -> None:
    check_number(name, "steps", steps, 0, _MOST, whole=True)
    check_number(name, "lr", lr, 0, _MOST, open_low=True)


def _descended(
    start: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, lr: float
) -> Tensor:
    """Where `steps` steps of Adam lead from `start`, which is left unchanged.

    As `torch.optim.Adam`, without the tenth of a millisecond that each of its steps takes besides.
    """
    place, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        slope = gradient(place)
        mean.lerp_(slope, 0.1)
        square.mul_(0.999).addcmul_(slope, slope, value=0.001)
        width = (square / (1 - 0.999**step)).sqrt_().add_(1e-8)
        place.addcdiv_(mean, width, value=-lr / (1 - 0.9**step))
    return place


def _estimated(tau: Tensor, epsilon: float, spread: float, rank: float) -> Tensor:
    """The shares of ACE in one matrix, `[T, rows, columns]`, float64."""
    exact, tau = tau.dtype == torch.float64, tau.double()
    sizes = tau.flatten(1).square().sum(1)
    logs = (sizes + 1e-12).log()
    differ = len(tau) > 1 and bool(logs.var() > spread * (logs.mean().square() + 1e-12))
    if differ:
        traces = torch.stack([(own - own.mean(0)).square().sum() for own in tau])
        taking_part = traces >= _LEAST * traces.max()
        if not bool(taking_part.all()):
            found, rest = torch.zeros_like(tau), tau[taking_part]
            found[taking_part] = _estimated(rest if exact else rest.float(), epsilon, spread, rank)
            return found

    def covariance(own: Tensor) -> tuple[Tensor, Tensor, float]:
        """c_t, C_t and the ridge of a task."""
        centred = own - own.mean(0)
        gram = centred.T @ centred
        trace = float(gram.trace()) + 1e-12 if differ else 1.0
        return centred, gram / trace, epsilon / trace

    eye = torch.eye(tau.shape[2], dtype=tau.dtype, device=tau.device)
    total, plain = torch.zeros_like(eye), torch.zeros_like(eye)
    for own in tau:
        _, gram, ridge = covariance(own)
        plain += gram
        total += gram + ridge * eye
    prior = plain.mean(0) / (sizes.mean() + 1e-12 if differ else 1)
    shares, fused = torch.empty_like(tau), torch.empty_like(tau if differ else tau[:0])
    factors = torch.linalg.lu_factor((total + prior).T)
    for row, own in enumerate(tau):
        centred, gram, ridge = covariance(own)
        weighted = centred @ gram + ridge * centred
        shares[row] = torch.linalg.lu_solve(*factors, weighted.T).T
        if differ:
            fused[row] = shares[row] + own @ (gram - total / len(tau))
    if differ:
        _, values, right = decomposed(fused.sum(0), exact)
        kept = max(1, int(rank * len(values)))
        values, right = values[:kept], right[:, :kept]
        shares += values.mean() * fused @ ((right * reciprocal(values)) @ right.T)
    return shares


def _moved(tau: Tensor, factors: Tensor, subspace: int, steps: int, lr: float) -> Tensor:
    """The change δ `[rows, columns]` that DOGE gives all tasks of one matrix."""
    exact, rank = tau.dtype == torch.float64, min(tau.shape[1:])
    lefts = [decomposed(own, exact, rank // len(tau))[0] for own in tau]
    basis = decomposed(torch.cat(lefts, 1), exact, rank // subspace)[0].to(tau)
    weight = factors.sum()
    start = (tau * (tau - (factors * tau).sum(0))).sum(2).T[..., None]  # [rows, T, 1]
    rows = tau.transpose(0, 1).contiguous()

    def gradient(change: Tensor) -> Tensor:
        left = start - weight * (rows @ change[..., None])
        slope = -2 * weight * (left.mT @ rows)[:, 0]
        return slope - basis @ (basis.T @ slope)

    return _descended(torch.zeros_like(tau[0]), gradient, steps, lr)


def _thresholds(task_vectors: TaskVectors, density: float, layers: Layers) -> Tensor:
    """The smallest magnitude that each task keeps, `[T]`; one task's in memory at a time."""
    names = matrices_of(task_vectors, layers)
    found = []
    for row in range(len(task_vectors.tasks)):
        parts = [task_vectors.layers[n].row(row, task_vectors.pretrained[n]) for n in names]
        magnitudes = torch.cat([part.flatten() for part in parts]).abs_()
        rank = len(magnitudes) - int(density * len(magnitudes))
        found.append(magnitudes.kthvalue(max(1, rank)).values)
    return torch.stack(found)
