"""Merges along spheres: baselines that interpolate directions and norms apart.

Each result is a sum of multiples of the experts and of the pretrained weights, so that it is
written as one vector per task as all merges are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.transforms.layers import check_number, each_layer, products, spread
from adamerge.transforms.matrices import reciprocal
from adamerge.weights.task_vectors import TaskVectors

_PARALLEL = 0.9995  # cosine above which slerp is linear
_TINY = torch.finfo(torch.float64).tiny
_NONE = 1e-6  # a mean of unit vectors shorter than this has no direction


def slerp(task_vectors: TaskVectors, position: float = 0.5) -> TaskVectors:
    """The weights of two experts, interpolated on a sphere layer by layer:
    `(sin((1 − p) ω) θ_0 + sin(p ω) θ_1) / sin ω`, ω the angle between them.

    Animating Rotation with Quaternion Curves (Shoemake, 1985), as used to merge two models. Linear
    in layers where `|cos ω| > 0.9995`. The sum is the whole merge: init 1.

    Args:
        task_vectors: of two tasks; left unchanged; all layers take part.
        position: p, from the first expert (0) to the second (1).

    Raises:
        AdamergeError: there are not two tasks, or `position` is out of range.
    """
    check_number("slerp", "position", position, 0, 1)
    if len(task_vectors.tasks) != 2:
        raise AdamergeError(
            f"slerp: there are {len(task_vectors.tasks)} tasks, expected 2: use multislerp or "
            "karcher for more"
        )

    def shares(found: Tensor) -> Tensor:
        cosine = (found[0, 1] / (found[0, 0] * found[1, 1]).sqrt().clamp_min(_TINY)).clamp(-1, 1)
        weights = torch.tensor([1 - position, position], dtype=torch.float64)
        if cosine.abs() > _PARALLEL:
            return weights
        angle = cosine.arccos()
        return (weights * angle).sin() / angle.sin()

    return _of_weights(task_vectors, shares)


def multislerp(task_vectors: TaskVectors) -> TaskVectors:
    """The mean direction of the task vectors with their mean norm, layer by layer:
    `τ_t / ‖τ_t‖ · mean_k ‖τ_k‖ / ‖Σ_k τ_k / ‖τ_k‖‖`.

    The multi-SLERP of mergekit with equal weights: of its map to the tangent space at the mean
    direction and back nothing is left, because tangents sum to 0 there. Norms are taken as
    `‖τ‖ + 1e-8`, as there. Where directions cancel, the mean of the vectors. The sum is the whole
    merge: init 1. All layers take part.
    """

    def change(_: str, tau: Tensor) -> Tensor:
        found, count = products(tau), len(tau)
        norms = found.diagonal().sqrt()
        units = 1 / (norms + 1e-8)
        length = (units @ found @ units).clamp_min(0).sqrt() / count
        exact = reciprocal(norms)  # also where norms are no greater than 1e-8
        if (exact @ found @ exact).clamp_min(0).sqrt() < _NONE * count:
            return tau / count
        return tau * spread(units / count / length * norms.mean(), tau)

    return each_layer(task_vectors, change)


def karcher(task_vectors: TaskVectors, iterations: int = 50) -> TaskVectors:
    """The spherical mean of the experts' weights with their mean norm, layer by layer.

    Riemannian Center of Mass and Mollifier Smoothing (Karcher, 1977): the direction from which the
    sum of the logarithms of the experts' directions is 0, found by
    `m ← exp_m(mean_t log_m(θ_t / ‖θ_t‖))` until a step is below 1e-13. Experts of one pretrained
    model lie close together: nearly their mean. The sum is the whole merge: init 1. All layers
    take part. An expert that is 0 in a layer has no direction there and counts in the mean norm
    alone; where directions cancel, or one is opposite to their mean, the mean of the experts.

    Args:
        task_vectors: left unchanged.
        iterations: at most so many steps.

    Raises:
        AdamergeError: `iterations` is no whole number from 1 on.
    """
    check_number("karcher", "iterations", iterations, 1, 10**6, whole=True)

    def shares(found: Tensor) -> Tensor:
        norms, count = found.diagonal().clamp_min(0).sqrt(), len(found)
        there = (norms > 0).nonzero().squeeze(1)
        sizes = norms[there]
        cosines = found[there][:, there] / (sizes[:, None] * sizes)
        direction = _mean_direction(cosines, iterations) if len(there) else None
        if direction is None:
            return torch.full((count,), 1 / count, dtype=found.dtype)
        return torch.zeros_like(norms).index_copy(0, there, direction * norms.mean() / sizes)

    return _of_weights(task_vectors, shares)


def _mean_direction(cosines: Tensor, iterations: int) -> Tensor | None:
    """The spherical mean of unit vectors with these products `[T, T]`, in multiples of them; None
    where they have none."""
    count = len(cosines)
    mean = torch.full((count,), 1 / count, dtype=cosines.dtype)
    length = (mean @ cosines @ mean).clamp_min(0).sqrt()
    if length < _NONE:
        return None
    mean /= length
    for _ in range(iterations):
        to_mean = (cosines @ mean).clamp(-1, 1)
        if bool((to_mean < _NONE - 1).any()):  # every great circle leads there
            return None
        angles = to_mean.arccos()
        stretch = torch.where(angles > 1e-12, angles / angles.sin().clamp_min(_TINY), 1) / count
        step = stretch - (stretch @ to_mean) * mean
        length = (step @ cosines @ step).clamp_min(0).sqrt()
        if length < 1e-13:
            break
        mean = length.cos() * mean + length.sin() / length * step
    return mean


def _of_weights(task_vectors: TaskVectors, shares: Callable[[Tensor], Tensor]) -> TaskVectors:
    """The merge `Σ_t s_t θ_t` of the experts' weights, layer by layer, in one vector per task.

    Args:
        shares: s `[T]` of the products of the experts' weights, `[T, T]`, float64.
    """

    def change(name: str, tau: Tensor) -> Tensor:
        base = task_vectors.pretrained[name]
        found = shares(products(base + tau))
        # Σ s_t θ_t − θ0 = Σ s_t τ_t + (Σ s_t − 1) θ0: every task takes the same part of the last.
        rest = float(found.sum() - 1) / len(tau)
        return tau * spread(found, tau) + rest * base

    return each_layer(task_vectors, change)
