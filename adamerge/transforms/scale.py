"""Transforms that multiply task vectors by numbers made of their norms, angles and depth."""

from __future__ import annotations

import logging
import re

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.transforms.layers import check_number, each_layer, products, spread
from adamerge.weights.task_vectors import TaskVectors

log = logging.getLogger("adamerge")


def metagpt(task_vectors: TaskVectors) -> TaskVectors:
    """Each task vector times its share of the squared norms: `τ_t · ‖τ_t‖² / Σ_k ‖τ_k‖²`.

    MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic
    (arXiv 2406.11385). Norms are taken over all layers, which are all changed. The sum is the whole
    merge: init 1. It is the mean of experts whose norms are equal.
    """
    norms = task_vectors.norms().square()
    shares = norms / norms.sum()
    return each_layer(task_vectors, lambda _, tau: tau * spread(shares, tau))


def model_stock(task_vectors: TaskVectors) -> TaskVectors:
    """The mean, as far from the pretrained weights as the angles of the experts say:
    `r_l · τ_t / T` with `r_l = T c_l / (1 + (T − 1) c_l)` in layer l.

    Model Stock: All we need is just a few fine-tuned models (arXiv 2403.19522). c is the mean over
    pairs of tasks of the cosine of their task vectors in that layer; all layers take part. The sum
    is the whole merge: init 1. Made for experts of one task: where they are of different tasks,
    cosines are near 0 and so is the merge, and where they are negative a log line says so. A layer
    in which they cancel, `1 + (T − 1) c = 0`, stays pretrained.

    Raises:
        AdamergeError: there is one task.
    """
    count = len(task_vectors.tasks)
    if count < 2:
        raise AdamergeError("model_stock: there is one task vector, expected two or more")
    negative: dict[str, float] = {}

    def change(name: str, tau: Tensor) -> Tensor:
        cosine = _mean_cosine(tau)
        if cosine < 0:
            negative[name] = cosine
        left = 1 + (count - 1) * cosine
        return tau * (cosine / left if left > 1e-6 else 0.0)

    changed = each_layer(task_vectors, change)
    if negative:
        log.warning(
            "model_stock: the task vectors' mean cosine is negative in %d of %d layers (%.3f in "
            "%s): the merge goes away from the experts there",
            *(len(negative), len(task_vectors.names), min(negative.values())),
            min(negative, key=negative.__getitem__),
        )
    return changed


def _mean_cosine(tau: Tensor) -> float:
    """Over pairs of different tasks; of a vector of zeros with any other it is 0."""
    found = products(tau)
    norms = found.diagonal().sqrt()
    cosines = found / (norms[:, None] * norms).clamp_min(torch.finfo(torch.float64).tiny)
    pairs = len(tau) * (len(tau) - 1)
    return float(cosines.sum() - cosines.diagonal().sum()) / pairs


def lines(
    task_vectors: TaskVectors,
    alpha: float | None = None,
    beta: float = 0.5,
    experts: TaskVectors | None = None,
) -> TaskVectors:
    """Task vectors scaled by depth: `(α + β · b / (B − 1)) τ_t` in block b of B, `α τ_t` elsewhere.

    LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging
    (arXiv 2410.17146). A layer's block is the first number in its name; layers without one
    (embeddings, the projection, the last normalisation) take α. The sum is the whole merge: init 1.
    After other transforms, it scales what they give.

    Args:
        task_vectors: left unchanged.
        alpha: null for the paper's `‖Σ_t τ_t‖₁ / (T ‖Σ_t v_t‖₁)`, with τ the experts' own and v
            the given vectors: 1 / T without a transform before.
        beta: what the last block gets more than the first; the paper chooses it on labeled data.
        experts: the experts' own task vectors, which a run supplies; None: the given ones are.

    Raises:
        AdamergeError: no layer is in a block, a number is out of range, or the vectors' sum is 0.
    """
    if alpha is not None:
        check_number("lines", "alpha", alpha, 0, 10)
    check_number("lines", "beta", beta, 0, 10)
    blocks = {name: int(found[0]) for name in task_vectors.names if (found := _numbers(name))}
    if not blocks:
        raise AdamergeError(
            "lines: no layer's name has the number of a block in it, expected names as "
            "'transformer.resblocks.3.mlp.c_fc.weight': use another transform"
        )
    last = max(1, max(blocks.values()))
    least = _alpha(task_vectors, experts or task_vectors) if alpha is None else float(alpha)

    def change(name: str, tau: Tensor) -> Tensor:
        return tau * (least + beta * blocks.get(name, 0) / last)

    return each_layer(task_vectors, change)


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if re.fullmatch(r"\d+", part)]


def _alpha(task_vectors: TaskVectors, experts: TaskVectors) -> float:
    before, after = _size_of_sum(experts), _size_of_sum(task_vectors)
    if after == 0:
        raise AdamergeError("lines: the sum of the task vectors is 0: give alpha as a number")
    return before / after / len(task_vectors.tasks)


def _size_of_sum(task_vectors: TaskVectors) -> float:
    """`‖Σ_t τ_t‖₁` over all layers."""
    return sum(float(t.sum(0).abs().sum(dtype=torch.float64)) for t in task_vectors.deltas.values())
