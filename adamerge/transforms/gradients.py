"""Transforms that ask for `gradients`: squared gradients of the experts' predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.encoders.gradients import Gradients
from adamerge.transforms.layers import check_number, each_layer, spread
from adamerge.weights.task_vectors import TaskVectors


def fisher(
    task_vectors: TaskVectors,
    gradients: Gradients,
    classes: Literal["all", "predicted"] = "all",
    normalised: bool = True,
    floor: float = 1e-6,
) -> TaskVectors:
    """Fisher merging's share of each task: `c_t (F_t + floor) τ_t / Σ_k c_k (F_k + floor)`.

    Merging Models with Fisher-Weighted Averaging (arXiv 2111.09832). F_t is the diagonal of expert
    t's Fisher matrix on unlabeled images, an entry per weight: `E Σ_c p_c (∂ log p_c)²` over the
    classes c that the expert itself predicts with probabilities p. All layers are changed, entry by
    entry. The sum of the shares is the whole merge: init 1.

    Asks for `gradients`. With all classes that costs up to C − 1 or D backward passes per image
    (fewer the surer an expert is), with the predicted class alone one.

    Args:
        task_vectors: the experts' task vectors; left unchanged.
        gradients: an `encoders.gradients.Gradients` of the same tasks.
        classes: `all`, or `predicted`: `(∂ log p_c)²` of the likeliest class in place of the sum.
        normalised: with c_t ∝ 1 / (‖F_t‖ + floor), sum 1, as the authors' code, so that no task
            outweighs others by the size of its gradients; without, every c_t is 1.
        floor: added to F, so that weights that no image needs are averaged.

    Raises:
        AdamergeError: another word for `classes`, or a floor outside (0, 1].
    """
    if classes not in ("all", "predicted"):
        raise AdamergeError(f"fisher: classes is {classes!r}, expected 'all' or 'predicted'")
    check_number("fisher", "floor", floor, 0, 1, open_low=True)
    return _weighted(task_vectors, gradients.squared(classes), normalised, floor)


def fisher_batch_sum(
    task_vectors: TaskVectors,
    gradients: Gradients,
    normalised: bool = True,
    floor: float = 1e-6,
) -> TaskVectors:
    """`fisher` with the F_t that published tables used, which is no Fisher matrix.

    `(∂ Σ_images Σ_c √p_c log p_c)² / images` of each batch: the gradient is squared after it is
    summed over images and classes, products of different ones included, as in the code of MergeLM
    and FusionBench. It depends on which images come in one batch. The sum of the shares is the
    whole merge: init 1.

    Asks for `gradients`; costs one backward pass per batch.

    Arguments are those of `fisher`.

    Raises:
        AdamergeError: a floor outside (0, 1].
    """
    check_number("fisher_batch_sum", "floor", floor, 0, 1, open_low=True)
    return _weighted(task_vectors, gradients.squared("batch_sum"), normalised, floor)


def _weighted(
    task_vectors: TaskVectors, squares: Mapping[str, Tensor], normalised: bool, floor: float
) -> TaskVectors:
    weights = torch.ones(len(task_vectors.tasks), dtype=torch.float64)
    if normalised:
        weights = task_weights(squares, floor)

    def shares(name: str, tau: Tensor) -> Tensor:
        used = spread(weights, tau) * (squares[name].to(tau) + floor)
        return tau * (used / used.sum(0))

    return each_layer(task_vectors, shares)


def task_weights(squares: Mapping[str, Tensor], floor: float) -> Tensor:
    """`c_t ∝ 1 / (‖F_t‖ + floor)` over all layers, sum 1: `[T]`, float64."""
    norms = sum(own.double().flatten(1).square().sum(1) for own in squares.values())
    assert isinstance(norms, Tensor)  # there are layers
    inverse = 1 / (norms.sqrt().cpu() + floor)
    return inverse / inverse.sum()
