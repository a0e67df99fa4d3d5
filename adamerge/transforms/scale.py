"""Transforms that multiply task vectors by numbers made of their norms and angles."""

from __future__ import annotations

from adamerge.transforms.layers import each_layer, spread
from adamerge.weights.task_vectors import TaskVectors


def metagpt(task_vectors: TaskVectors) -> TaskVectors:
    """Each task vector times its share of the squared norms: `τ_t · ‖τ_t‖² / Σ_k ‖τ_k‖²`.

    MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic
    (arXiv 2406.11385). Norms are taken over all layers, which are all changed. The sum is the whole
    merge: init 1. It is the mean of experts whose norms are equal.
    """
    norms = task_vectors.norms().square()
    shares = norms / norms.sum()
    return each_layer(task_vectors, lambda _, tau: tau * spread(shares, tau))
