"""Task vectors of which every process holds a part (`task_vectors.shard`)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge._base.compat import all_gather, reduce_scatter
from adamerge.weights.merging import as_type
from adamerge.weights.storage import contract, merge
from adamerge.weights.task_vectors import TaskVectors


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a layer (its first dimension), of `width` numbers each."""

    name: str
    start: int
    stop: int
    width: int

    @property
    def numel(self) -> int:
        return (self.stop - self.start) * self.width

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a layer's tensor."""
        return tensor[self.start : self.stop] if tensor.ndim else tensor


def cut(shapes: dict[str, torch.Size], ranks: int) -> list[list[Part]]:
    """Every process's parts of all layers: neighbouring rows, `P / ranks` numbers but for a row."""
    total = sum(shape.numel() for shape in shapes.values())
    parts: list[list[Part]] = [[] for _ in range(ranks)]
    passed = 0
    for name, shape in shapes.items():
        height = shape[0] if shape else 1
        width = shape.numel() // max(height, 1)
        # Row r belongs to the process in whose share of all numbers its beginning lies.
        edges = [-(-(rank * total // ranks - passed) // max(width, 1)) for rank in range(ranks)]
        edges = [min(max(edge, 0), height) for edge in edges] + [height]
        for rank, (start, stop) in enumerate(itertools.pairwise(edges)):
            if stop > start:
                parts[rank].append(Part(name, start, stop, width))
        passed += shape.numel()
    return parts


class ShardedTaskVectors(TaskVectors):
    """Task vectors that merge the parts of all processes of a `torch.distributed` group.

    Every process merges its own rows of all layers, and all gather what the others have merged; in
    the backward pass the gradients of W are summed over the processes, each part at the process
    that holds its τ. Each process then has its own layers' share of the gradient of λ, summed over
    all processes' images: the mean over processes that DDP takes of it is that of an unsharded run.

    `combine` and its backward are collective: every process must call them, in the same order.

    Args:
        whole: all task vectors, best on disk; kept for `whole`, out of which folds are made.
        rank, ranks: of this process.
    """

    def __init__(self, whole: TaskVectors, rank: int, ranks: int) -> None:
        self.__dict__.update(whole.__dict__)
        self._whole = whole
        self.parts = cut({n: t.shape for n, t in whole.pretrained.items()}, ranks)
        # Numbers of the largest share: collectives want all alike.
        self.room = max(sum(part.numel for part in parts) for parts in self.parts)
        self.rank = rank
        self.tau = {
            part.name: whole.layers[part.name].rows(part.start, part.stop).map(torch.clone)
            for part in self.parts[rank]
        }
        self._ahead = self._groups = self._home = whole._ahead = None

    @property
    def whole(self) -> TaskVectors:
        return self._whole

    def nbytes(self) -> int:
        """Bytes of this process's τ."""
        return sum(layer.nbytes for layer in self.tau.values())

    def apply(self, fn: Callable[[Tensor], Tensor]) -> ShardedTaskVectors:
        """A copy with θ0 and this process's τ mapped; the whole stays where it is."""
        other = copy.copy(self)
        other.pretrained = {name: fn(tensor) for name, tensor in self.pretrained.items()}
        other.constants = {name: fn(tensor) for name, tensor in self.constants.items()}
        other.buffers = {name: fn(tensor) for name, tensor in self.buffers.items()}
        other.tau = {name: layer.to(other.device) for name, layer in self.tau.items()}
        return other

    def _merged(self, coefficients: Tensor, dtype: torch.dtype | None) -> Iterator[Tensor]:
        yield from _ShardedMerge.apply(coefficients, self, dtype)


class _ShardedMerge(torch.autograd.Function):
    """Merges own parts, gathers all; reduces and scatters dL/dW, contracts own parts."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, vectors: ShardedTaskVectors, dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        ctx.vectors, ctx.dtype = vectors, coefficients.dtype
        ctx.set_materialize_grads(False)
        columns = dict(zip(vectors.names, coefficients.unbind(1), strict=True))
        with torch.autocast(coefficients.device.type, enabled=False):
            merged = _empty(vectors, 1)
            for part, numbers in _pieces(merged, [vectors.parts[vectors.rank]]):
                base, column = part.of(vectors.pretrained[part.name]), columns[part.name]
                layer = vectors.tau[part.name]
                numbers.copy_(merge(base, layer, column.to(base.dtype)).view(-1))
            everything = _empty(vectors, len(vectors.parts))
            all_gather(everything, merged)
            pieces: dict[str, list[Tensor]] = {name: [] for name in vectors.names}
            for part, numbers in _pieces(everything, vectors.parts):
                pieces[part.name].append(numbers)
            return tuple(
                _joined(pieces[name], base).to(as_type(base, dtype))
                for name, base in vectors.pretrained.items()
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        vectors: ShardedTaskVectors = ctx.vectors
        by_name = dict(zip(vectors.names, grads, strict=True))
        with torch.autocast(vectors.device.type, enabled=False):
            everything = _empty(vectors, len(vectors.parts)).zero_()
            for part, numbers in _pieces(everything, vectors.parts):
                grad = by_name[part.name]
                if grad is not None:
                    numbers.copy_(part.of(grad).reshape(-1))
            summed = _empty(vectors, 1)
            reduce_scatter(summed, everything)
            table = summed.new_zeros(len(vectors.tasks), len(vectors.names))
            index = {name: column for column, name in enumerate(vectors.names)}
            for part, numbers in _pieces(summed, [vectors.parts[vectors.rank]]):
                like = part.of(vectors.pretrained[part.name])
                grad, layer = numbers.view(like.shape), vectors.tau[part.name]
                table[:, index[part.name]] = contract(grad, layer, like)
        return table.to(ctx.dtype), None, None


def _empty(vectors: ShardedTaskVectors, shares: int) -> Tensor:
    return vectors.pretrained[vectors.names[0]].new_empty(shares * vectors.room)


def _pieces(numbers: Tensor, shares: list[list[Part]]) -> Iterator[tuple[Part, Tensor]]:
    """Every part of some processes, in the order of layers, and its own of all shares' numbers."""
    for share, parts in zip(numbers.view(len(shares), -1), shares, strict=True):
        place = 0
        for part in parts:
            yield part, share[place : place + part.numel]
            place += part.numel


def _joined(pieces: list[Tensor], base: Tensor) -> Tensor:
    flat = pieces[0] if len(pieces) == 1 else torch.cat([base.new_empty(0), *pieces])
    return flat.view(base.shape)
