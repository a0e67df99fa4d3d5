"""Transforms that ask for `inputs`: what unlabeled images give to each linear layer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.encoders.statistics import LayerInputs
from adamerge.weights.task_vectors import TaskVectors

log = logging.getLogger("adamerge")


def regmean(
    task_vectors: TaskVectors,
    inputs: Mapping[str, LayerInputs],
    off_diagonal: float = 0.95,
) -> TaskVectors:
    """RegMean's share of each task: `τ_t Ĝ_t (Σ_k Ĝ_k)⁻¹` for a linear layer `[out, in]`.

    Dataless Knowledge Fusion by Merging Weights of Language Models (arXiv 2212.09849). G_t is the
    Gram matrix of the layer's inputs under expert t, Ĝ_t that with its entries off the diagonal
    times `off_diagonal`; the sum is the layer whose outputs are nearest to all experts' on their
    own inputs. Layers whose inputs are not known (normalisations, biases, embeddings, projections)
    are averaged: `τ_t / T`. The sum of the shares is the whole merge: init 1.

    Asks for `inputs`. Costs T products of `[out, in]` by `[in, in]` per layer, and a solution of
    T · out equations in float64.

    Args:
        task_vectors: the experts' task vectors; left unchanged.
        inputs: from `encoders.statistics.gather_inputs`, of the same tasks.
        off_diagonal: between 0 (each input by itself) and 1 (RegMean without it). Below 1 a sum of
            Gram matrices can be inverted even with few images.

    Raises:
        AdamergeError: `off_diagonal` out of range, or inputs of other tasks or layers.
    """
    check_off_diagonal(off_diagonal, "regmean")

    def shares(name: str, tau: Tensor) -> Tensor:
        if name not in inputs:
            return tau / len(tau)
        grams = _of_layer(inputs, name, tau).gram
        total = torch.zeros(grams.shape[1:], dtype=torch.float64, device=tau.device)
        weighted = torch.empty(tau.shape, dtype=grams.dtype, device=tau.device)
        for row, (own, gram) in enumerate(zip(tau, grams, strict=True)):
            used = damped(gram.to(tau.device), off_diagonal)
            total += used
            torch.matmul(own.to(used), used, out=weighted[row])
        return divided(weighted, total, name).to(tau)

    return task_vectors.with_deltas((n, shares(n, tau)) for n, tau in task_vectors.deltas.items())


def check_off_diagonal(factor: float, name: str) -> None:
    """Raises AdamergeError for a factor outside [0, 1]."""
    if not 0 <= factor <= 1:
        raise AdamergeError(
            f"{name}: off_diagonal is {factor}, expected a number from 0 to 1, like 0.95"
        )


def damped(gram: Tensor, off_diagonal: float) -> Tensor:
    """A Gram matrix `[in, in]` with the entries off its diagonal times a factor."""
    used = gram * off_diagonal
    used.diagonal().copy_(gram.diagonal())
    return used


def divided(weighted: Tensor, gram: Tensor, name: str) -> Tensor:
    """`weighted · gram⁻¹` for `[…, out, in]` and `[in, in]` float64; in float64.

    A matrix that cannot be inverted gets the least ridge that allows it, and a log line says so.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    ridge, size = 0.0, gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    while bool(failed) and ridge < 1:
        ridge = max(10 * ridge, 1e-12)
        factor, failed = torch.linalg.cholesky_ex(
            gram + ridge * size * torch.eye(len(gram)).to(gram)
        )
    if ridge:
        log.warning(
            "layer %s: the inputs of the images do not span all its columns; a ridge of %.0e of "
            "their mean square was added: more images would do without", name, ridge,
        )  # fmt: skip
    flat = weighted.reshape(-1, weighted.shape[-1]).to(gram)
    return torch.cholesky_solve(flat.T, factor).T.reshape(weighted.shape)


def _of_layer(inputs: Mapping[str, LayerInputs], name: str, tau: Tensor) -> LayerInputs:
    found = inputs[name]
    expected = [len(tau), tau.shape[-1], tau.shape[-1]]
    if list(found.gram.shape) != expected:
        raise AdamergeError(
            f"the inputs of layer {name!r} have Gram matrices of shape {list(found.gram.shape)}: "
            f"expected {expected} ([tasks, in, in]); gather them with these task vectors"
        )
    return found


def esm(
    task_vectors: TaskVectors,
    inputs: Mapping[str, LayerInputs],
    power: float = 2.0,
    spectrum: float = 0.15,
    scale: float = 2.0,
) -> TaskVectors:
    """Essential Subspace Merging's share of each task: `U⊥_t V⊥_t` of every linear layer.

    Model Merging in the Essential Subspace (arXiv 2602.20208). U_t holds the first k = out // T
    principal directions of the output shift `X τ_tᵀ` that a task vector makes of its expert's
    inputs X, and `V_t = U_tᵀ τ_t`. Both are scaled by the directions' variances (to the power
    `spectrum`, mean 1), V_t by `‖τ_t‖` over its mean (to `power`), and the columns of all V_t
    together by their norms over their mean (to `power`). U⊥ and V⊥ are the nearest orthogonal
    matrices to all U_t side by side and all V_t one below the other, times the mean of their
    singular values. Every layer of a kind (all `c_fc`, …) is scaled by its norm over their mean (to
    `power`), and all by `scale`. Layers whose inputs are not known are averaged: `τ_t / T`. The sum
    of the shares is the whole merge: init 1.

    The defaults are those of the authors' code, which differs in two things: it takes attention's
    output projections, whose inputs it does not see, and other matrices by TSV-M.

    Asks for `inputs` (32 images a task do). Costs one decomposition per task and layer and two
    more per layer.

    Args:
        task_vectors: the experts' task vectors; left unchanged.
        inputs: from `encoders.statistics.gather_inputs`, of the same tasks.
        power: of the scalings between tasks, columns and layers; 0 does without.
        spectrum: of the scaling within a task; 0 does without.
        scale: of the linear layers' sum.

    Raises:
        AdamergeError: a layer with fewer outputs than tasks, or inputs of other tasks or layers.
    """
    sizes: dict[str, float] = {}

    def shares(name: str, tau: Tensor) -> Tensor:
        if name not in inputs:
            return tau / len(tau)
        merged = _essential(tau, _of_layer(inputs, name, tau).gram, power, spectrum, name) * scale
        sizes[name] = float(merged.sum(0).norm())
        return merged

    found = task_vectors.with_deltas((n, shares(n, tau)) for n, tau in task_vectors.deltas.items())
    kinds: dict[str, list[float]] = {}
    for name, size in sizes.items():
        kinds.setdefault(_kind(name), []).append(size)

    def scaled(name: str, tau: Tensor) -> Tensor:
        if name not in sizes:
            return tau
        alike = kinds[_kind(name)]
        return tau * (sizes[name] * len(alike) / sum(alike)) ** power if sum(alike) else tau

    return found.with_deltas((n, scaled(n, tau)) for n, tau in found.deltas.items())


def _kind(name: str) -> str:
    """`transformer.resblocks.3.mlp.c_fc.weight` -> `transformer.resblocks.#.mlp.c_fc.weight`."""
    return re.sub(r"\d+", "#", name)


def _essential(tau: Tensor, grams: Tensor, power: float, spectrum: float, name: str) -> Tensor:
    tasks, rows, columns = tau.shape
    kept = min(rows // tasks, columns)
    if kept == 0:
        raise AdamergeError(
            f"esm: layer {name!r} has {rows} outputs for {tasks} tasks: expected at least one "
            "direction for each; merge fewer tasks"
        )
    lefts, rights = [], []
    lengths = tau.flatten(1).norm(dim=1)
    for own, gram, length in zip(tau, grams, lengths / lengths.mean(), strict=True):
        directions, variances = _directions(own, gram.to(own), kept)
        weights = (variances / variances.mean()) ** spectrum
        weights = weights / weights.mean()
        lefts.append(directions * weights)
        rights.append(weights[:, None] * (directions.T @ own) * length**power)
    left, right = torch.cat(lefts, 1), torch.cat(rights)
    sizes = right.norm(dim=0)
    left, right = _orthogonal(left), _orthogonal(right * (sizes / sizes.mean()) ** power)
    return torch.stack([u @ v for u, v in zip(left.split(kept, 1), right.split(kept), strict=True)])


def _directions(tau: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first principal directions `[out, count]` of `X τᵀ` and their variances, by XᵀX."""
    rows, columns = tau.shape
    if rows <= columns:
        values, vectors = torch.linalg.eigh(tau @ gram @ tau.T)
        return vectors.flip(1)[:, :count], values.flip(0)[:count].clamp_min(0)
    values, vectors = torch.linalg.eigh(gram)
    vectors, roots, _ = torch.linalg.svd(tau @ (vectors * values.clamp_min(0).sqrt()), False)
    return vectors[:, :count], roots[:count].square()


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, `P Qᵀ` of `P D Qᵀ`, times the mean of D."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right * values.mean()
