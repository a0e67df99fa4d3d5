"""Merges whose coefficients differ within a layer: one for every part of it, or every entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge._base.errors import AdamergeError
from adamerge.weights.task_vectors import TaskVectors


def combine(
    vectors: TaskVectors, tables: Sequence[Tensor], parts: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """`W_l = θ0_l + Σ_t λ_l[t] ∘ τ_l[t]`, differentiable in every λ_l.

    τ is read once here and once in the backward pass, and nothing of its size is kept for that.

    >>> start, a = ({"w": torch.tensor(w)} for w in ([1.0, 1.0], [3.0, 5.0]))
    >>> vectors = TaskVectors(start, {"a": a})
    >>> combine(vectors, [torch.tensor([[0.5, 1.0]])])["w"]
    tensor([2., 5.])
    >>> combine(vectors, [torch.tensor([[0.5, 1.0, 0.0]])], [torch.tensor([0, 2])])["w"]
    tensor([2., 1.])

    Args:
        tables: λ of each layer: `[T, *shape]`; with `parts` `[T, K]`.
        parts: of each layer the part that every entry belongs to, integers `[*shape]` below K.

    Returns:
        layer name -> tensor.

    Raises:
        AdamergeError: task vectors that are shared out among processes.
    """
    if vectors.whole is not vectors:
        raise AdamergeError(
            "coefficients within layers need whole task vectors at every process: set "
            "task_vectors.shard=false, or method.granularity to layer, block or task"
        )
    merged = {}
    for row, (name, table) in enumerate(zip(vectors.names, tables, strict=True)):
        merged[name] = _Merge.apply(table, vectors, name, None if parts is None else parts[row])
    return merged


class _Merge(torch.autograd.Function):
    """One layer: λ `[T, *shape]` or `[T, K]` -> W; the backward multiplies dL/dW by τ."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, vectors: TaskVectors, name: str, parts: Tensor | None
    ) -> Tensor:
        ctx.vectors, ctx.name, ctx.parts, ctx.shape = vectors, name, parts, table.shape
        merged = vectors.pretrained[name].clone()
        for own, tau in zip(table, vectors.deltas[name], strict=True):
            merged.addcmul_((own if parts is None else own[parts.int()]).to(tau), tau)
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows = []
        for tau in ctx.vectors.deltas[ctx.name]:
            product = grad.to(tau) * tau
            if ctx.parts is not None:  # one sum after the other: the same bits every time
                wanted = range(ctx.shape[1])
                product = torch.stack(
                    [torch.where(ctx.parts == k, product, 0).sum() for k in wanted]
                )
            rows.append(product)
        return torch.stack(rows), None, None, None
