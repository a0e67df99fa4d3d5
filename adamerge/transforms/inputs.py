"""Transforms that ask for `inputs`: what unlabeled images give to each linear layer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.encoders.statistics import LayerInputs
from adamerge.transforms.layers import check_number, each_layer
from adamerge.transforms.matrices import eigen, reciprocal, scaled, smaller_side
from adamerge.weights.task_vectors import TaskVectors

log = logging.getLogger("adamerge")

Inputs = Mapping[str, LayerInputs]
Device = torch.device | str | None


def regmean(
    task_vectors: TaskVectors,
    inputs: Inputs,
    off_diagonal: float = 0.95,
    device: Device = None,
) -> TaskVectors:
    """RegMean's share of each task: `τ_t Ĝ_t (Σ_k Ĝ_k)⁻¹` for a linear layer `[out, in]`.

    Dataless Knowledge Fusion by Merging Weights of Language Models (arXiv 2212.09849). G_t is the
    Gram matrix of the layer's inputs under expert t, Ĝ_t that with its entries off the diagonal
    times `off_diagonal`; the sum is the layer whose outputs are nearest to all experts' on their
    own inputs. Layers whose inputs are not known (normalisations, biases, embeddings, projections)
    are averaged: `τ_t / T`. The sum of the shares is the whole merge: init 1. Along directions that
    no image gives to a layer the shares are 0: there, and wholly where its inputs are all 0, it
    stays as pretrained.

    Asks for `inputs`. Costs a factorisation `[in, in]` in float64 per layer, and two products or a
    product and a solution per task.

    Args:
        task_vectors: the experts' task vectors; left unchanged.
        inputs: from `encoders.statistics.gather_inputs`, of the same tasks.
        off_diagonal: between 0 (each input by itself) and 1 (RegMean without it). Below 1 a sum of
            Gram matrices can be inverted even with few images.
        device: that computes; None: where the task vectors are.

    Raises:
        AdamergeError: `off_diagonal` out of range, or inputs of other tasks or layers.
    """
    check_number("regmean", "off_diagonal", off_diagonal, 0, 1)

    def shares(name: str, tau: Tensor) -> Tensor:
        if name not in inputs:
            return tau / len(tau)
        place, grams = device or tau.device, _grams(inputs, name, tau)
        total = torch.zeros(grams.shape[1:], dtype=torch.float64, device=place)
        for gram in grams:
            total += gram.to(place)
        factor, _ = factored(damped(total, off_diagonal), name)
        small = len(factor) <= tau.shape[1]  # in <= out: the product of the two small ones first
        inverse = torch.cholesky_inverse(factor) if small else None
        factor = factor.to(torch.promote_types(grams.dtype, torch.float32))
        parts = []
        for own, gram in zip(tau.to(place), grams, strict=True):
            gram = gram.to(place)
            if inverse is not None:
                parts.append(own @ (damped(gram.double(), off_diagonal) @ inverse).to(own))
            else:
                own = own.to(gram)
                rest = (1 - off_diagonal) * (own * gram.diagonal())
                parts.append(solved(torch.addmm(rest, own, gram, alpha=off_diagonal), factor))
        return torch.stack([part.to(tau) for part in parts])

    return each_layer(task_vectors, shares)


def _grams(inputs: Inputs, name: str, tau: Tensor) -> Tensor:
    grams, expected = inputs[name].gram, [len(tau), tau.shape[-1], tau.shape[-1]]
    if list(grams.shape) != expected:
        raise AdamergeError(
            f"the inputs of layer {name!r} have Gram matrices of shape {list(grams.shape)}: "
            f"expected {expected} ([tasks, in, in]); gather them with these task vectors"
        )
    return grams


def damped(gram: Tensor, off_diagonal: float) -> Tensor:
    """A Gram matrix `[in, in]` with the entries off its diagonal times a factor."""
    used = gram * off_diagonal
    used.diagonal().copy_(gram.diagonal())
    return used


def factored(gram: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of a layer's Gram matrix `[in, in]`, float64, and its ridge, `[]`.

    A matrix that has no factor gets the least ridge that gives it one, and a log line says so; else
    the ridge is 0.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    ridge, size = 0.0, gram.diagonal().mean()
    size = torch.where(size < torch.finfo(gram.dtype).tiny, 1.0, size)  # of no inputs but 0
    while bool(failed) and ridge < 1:
        ridge = max(10 * ridge, 1e-12)
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * size * identity)
    if ridge:
        log.warning(
            "layer %s: the images' inputs do not span all its columns, so that a ridge of %.0e of "
            "their mean square was added: more images would do without", name, ridge,
        )  # fmt: skip
    return factor, ridge * size


def solved(weighted: Tensor, factor: Tensor) -> Tensor:
    """`weighted · gram⁻¹` for `[out, in]` and what `factored` gave, in the type of the latter."""
    half = torch.linalg.solve_triangular(factor.T, weighted.to(factor), upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def esm(
    task_vectors: TaskVectors,
    inputs: Inputs,
    power: float = 2.0,
    spectrum: float = 0.15,
    scale: float = 2.0,
    device: Device = None,
) -> TaskVectors:
    """Essential Subspace Merging's share of each task: `U⊥_t V⊥_t` of every linear layer.

    Model Merging in the Essential Subspace (arXiv 2602.20208). U_t holds the first k = ⌊out / T⌋
    principal directions of the shift `X τ_tᵀ` that a task vector makes of its expert's inputs X,
    and `V_t = U_tᵀ τ_t`. Both are scaled by the directions' variances (to the power `spectrum`,
    mean 1), V_t by `‖τ_t‖` over its mean (to `power`), and the columns of all V_t together by their
    norms over their mean (to `power`). U⊥ and V⊥ are `P Qᵀ · mean D` of `P D Qᵀ`, all U_t side by
    side and all V_t one below the other. Every layer is then scaled by its norm over the mean of
    its kind (all `c_fc`, …; to `power`), and by `scale`. Layers whose inputs are not known are
    averaged: `τ_t / T`. The sum of the shares is the whole merge: init 1.

    `spectrum` and `scale` are of the authors' code, which treats attention's output projections,
    whose inputs it does not see, and matrices outside the blocks by TSV-M instead.

    Asks for `inputs`, of few images (the authors take 32). Costs one or two decompositions per
    layer and task, and two more per layer, in float64.

    Args:
        task_vectors: the experts' task vectors; left unchanged.
        inputs: from `encoders.statistics.gather_inputs`, of the same tasks.
        power: of the scalings between tasks, columns and layers; 0 does without.
        spectrum: of the scaling within a task; 0 does without.
        scale: of the sum of each linear layer.
        device: that computes; None: where the task vectors are.

    Raises:
        AdamergeError: a setting out of range, a layer with fewer outputs than tasks, or inputs of
            other tasks or layers.
    """
    for setting, value in (("power", power), ("spectrum", spectrum), ("scale", scale)):
        check_number("esm", setting, value, 0, 100)
    sizes: dict[str, dict[str, float]] = {}  # by kind and layer

    def shares(name: str, tau: Tensor) -> Tensor:
        if name not in inputs:
            return tau / len(tau)
        own, grams = tau.to(device or tau.device).double(), _grams(inputs, name, tau)
        merged = scale * _essential(own, grams.to(own), power, spectrum, name)
        sizes.setdefault(_kind(name), {})[name] = float(merged.sum(0).norm())
        return merged.to(tau)

    def polarised(name: str, tau: Tensor) -> Tensor:
        alike = sizes.get(_kind(name), {})
        if name not in alike or not any(alike.values()):
            return tau
        return tau * (alike[name] * len(alike) / sum(alike.values())) ** power

    return each_layer(each_layer(task_vectors, shares), polarised)


def _kind(name: str) -> str:
    """`transformer.resblocks.3.mlp.c_fc.weight` -> `transformer.resblocks.#.mlp.c_fc.weight`."""
    return re.sub(r"\d+", "#", name)


def _essential(tau: Tensor, grams: Tensor, power: float, spectrum: float, name: str) -> Tensor:
    """`[T, out, in]` of a layer, before it is compared with others of its kind."""
    tasks, rows, columns = tau.shape
    count = min(rows // tasks, columns)
    if count == 0:
        raise AdamergeError(
            f"esm: layer {name!r} has {rows} outputs for {tasks} tasks, expected at least one for "
            "each: merge fewer tasks"
        )
    lefts, rights = [], []
    lengths = tau.flatten(1).norm(dim=1)
    for own, gram, length in zip(tau, grams, _over_mean(lengths), strict=True):
        directions, variances = _directions(own, gram, count)
        weights = _over_mean(_over_mean(variances) ** spectrum)
        lefts.append(directions * weights)
        rights.append(weights[:, None] * (directions.T @ own) * length**power)
    right = torch.cat(rights)
    right = right * _over_mean(right.norm(dim=0)) ** power
    left, right = _orthogonal(torch.cat(lefts, 1)), _orthogonal(right)
    return torch.stack(
        [u @ v for u, v in zip(left.split(count, 1), right.split(count), strict=True)]
    )


def _over_mean(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)


def _directions(tau: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first principal directions `[out, count]` of `X τᵀ` and their variances, by XᵀX.

    A direction without variance is 0.
    """
    rows, columns = tau.shape
    if rows <= columns:
        variances, directions = eigen(tau @ gram @ tau.T)
        return directions[:, :count] * (variances[:count] > 0), variances[:count]
    values, basis = eigen(gram)
    shift = tau @ (basis * values.sqrt())
    variances, basis = eigen(shift.T @ shift)
    return (shift @ (basis * reciprocal(variances.sqrt())))[:, :count], variances[:count]


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthogonal rows or columns, `P Qᵀ` of `P D Qᵀ`, times D's mean; what
    the matrix has no part in is left out."""
    values, basis = smaller_side(matrix, exact=False)
    return scaled(matrix, basis, reciprocal(values)) * values.mean()
