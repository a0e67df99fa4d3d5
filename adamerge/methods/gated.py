"""Linear layers whose weights every image merges for itself, and sparse task vectors for them.

`W_b = θ0 + Σ_t g[b, t] τ_t` for image b with the gates g of a router (WEMoE, arXiv 2402.00433). All
images are merged together, some rows of W at a time: one matrix product of the gates and the task
vectors, which are then read once whatever the number of images, and a batched product with the
hidden states while the merged rows are still in the processor's cache. The backward pass merges
again. Neither keeps anything of the size images × parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SPARSE_ROWS = 32  # rows of a matrix that are stored, and made dense, together
# Numbers merged at a time: as few as stay in a processor's cache; with many tokens as many rows as
# tokens, for sums over tiles cost less then; never more than the second number.
_AT_ONCE = {"cpu": (2**19, 2**25), "cuda": (2**27, 2**27)}


class Deltas(Protocol):
    """τ of one matrix, `[T, out, in]`."""

    def rows(self, start: int, stop: int) -> Tensor:
        """`[T, (stop − start) · in]`, dense."""
        ...


class DenseDeltas:
    """τ as it is."""

    def __init__(self, deltas: Tensor) -> None:
        self.deltas = deltas.flatten(1)
        self.columns = deltas.shape[2]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.deltas[:, start * self.columns : stop * self.columns]


class SparseDeltas:
    """τ as values and places, 8 bytes for each kept float32 number.

    Args:
        values: the kept numbers `[K]`, tile by tile of `SPARSE_ROWS` rows (fewer in the last).
        places: int32 `[K]`, where each lies in its tile `[T, rows, in]`, flattened.
        starts: int64 `[tiles + 1]`, where each tile begins in `values`.
        shape: `(T, out, in)`.
    """

    def __init__(
        self, values: Tensor, places: Tensor, starts: Tensor, shape: tuple[int, int, int]
    ) -> None:
        self.values, self.places, self.shape = values, places, shape
        self.starts: list[int] = starts.tolist()

    @classmethod
    def of(cls, deltas: Tensor) -> SparseDeltas:
        """Those of `[T, out, in]` that are not zero."""
        values, places, starts = [], [], [0]
        for tile in deltas.split(SPARSE_ROWS, dim=1):
            flat = tile.flatten()
            kept = flat.nonzero().squeeze(1)
            values.append(flat[kept])
            places.append(kept.int())
            starts.append(starts[-1] + len(kept))
        shape = (deltas.shape[0], deltas.shape[1], deltas.shape[2])
        return cls(torch.cat(values), torch.cat(places), torch.tensor(starts), shape)

    def rows(self, start: int, stop: int) -> Tensor:
        tiles = [
            self._tile(index, min(SPARSE_ROWS, self.shape[1] - index * SPARSE_ROWS))
            for index in range(start // SPARSE_ROWS, -(-stop // SPARSE_ROWS))
        ]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, 1)

    def _tile(self, index: int, rows: int) -> Tensor:
        tasks, _, columns = self.shape
        dense = self.values.new_zeros(tasks * rows * columns)
        kept = slice(self.starts[index], self.starts[index + 1])
        dense.index_copy_(0, self.places[kept].long(), self.values[kept])
        return dense.view(tasks, -1)


def gated_linear(hidden: Tensor, gates: Tensor, weight: Tensor, deltas: Deltas) -> Tensor:
    """`y_g = h_g (W + Σ_t gates[g, t] τ_t)ᵀ`, differentiable in `hidden` and `gates` alone.

    Args:
        hidden: `[G, M, in]`: G groups of M tokens that share their gates.
        gates: `[G, T]`, of the dtype of `weight`.
        weight: `[out, in]`, frozen.
        deltas: τ `[T, out, in]`, frozen.

    Returns:
        `[G, M, out]`, in the dtype of autocast where it is on. Weights are merged in their own.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return cast(Tensor, _GatedLinear.apply(hidden, gates, weight, deltas))


def _tiles(
    gates: Tensor, weight: Tensor, deltas: Deltas, tokens: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of W at a time: which, their τ `[T, rows · in]`, the merged `[G, rows, in]`."""
    height, columns = weight.shape
    few, many = _AT_ONCE.get(weight.device.type, _AT_ONCE["cpu"])
    across = max(gates.shape) * columns
    fitting = max(few // across, min(tokens, many // across))
    size = max(-(-fitting // SPARSE_ROWS), 1) * SPARSE_ROWS
    store = weight.new_empty(len(gates) * min(size, height) * columns)
    for start in range(0, height, size):
        stop = min(start + size, height)
        tile = deltas.rows(start, stop)
        merged = store[: len(gates) * (stop - start) * columns].view(len(gates), -1)
        torch.addmm(weight[start:stop].reshape(1, -1), gates, tile, out=merged)
        yield slice(start, stop), tile, merged.view(len(gates), stop - start, columns)


class _GatedLinear(torch.autograd.Function):
    """Keeps the hidden states and the gates; W is merged once more for the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gates: Tensor, weight: Tensor, deltas: Deltas) -> Tensor:
        ctx.save_for_backward(hidden, gates)
        ctx.weight, ctx.deltas = weight, deltas
        output = hidden.new_empty(*hidden.shape[:2], len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, _, merged in _tiles(gates, weight, deltas, hidden.shape[1]):
                output[..., rows] = torch.bmm(hidden, merged.to(hidden.dtype).mT)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, gates = ctx.saved_tensors
        to_hidden, to_gates = ctx.needs_input_grad[:2]
        # Sums over tiles in the precision of the weights, also where products are in bfloat16.
        d_hidden = hidden.new_zeros(hidden.shape, dtype=gates.dtype) if to_hidden else None
        d_gates = torch.zeros_like(gates) if to_gates else None
        grad = grad.to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, tile, merged in _tiles(gates, ctx.weight, ctx.deltas, hidden.shape[1]):
                part = grad[..., rows]
                if d_hidden is not None and hidden.dtype == gates.dtype:
                    d_hidden.baddbmm_(part, merged)
                elif d_hidden is not None:
                    d_hidden += torch.bmm(part, merged.to(part.dtype))
                if d_gates is not None:
                    # Where the merged rows were, which are of no more use: memory that is new costs
                    # more than the product.
                    outer = merged if hidden.dtype == merged.dtype else None
                    outer = torch.bmm(part.mT, hidden, out=outer).to(gates.dtype)
                    d_gates.addmm_(outer.flatten(1), tile.T)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_gates, None, None


def largest(deltas: Tensor, density: float) -> Tensor:
    """Keeps of every `deltas[t]` the entries whose magnitude exceeds its (1 − density) quantile.

    The quantile is interpolated linearly between the two nearest ranks, exactly and for tensors of
    any size (E-WEMoE, arXiv 2410.21804); density 1 keeps everything.
    """
    if density >= 1:
        return deltas
    return torch.stack([row * (row.abs() > _quantile(row.abs(), 1 - density)) for row in deltas])


def _quantile(values: Tensor, q: float) -> Tensor:
    """`torch.quantile(values, q)`, which refuses more than 16 million numbers."""
    flat = values.flatten()
    rank = q * (flat.numel() - 1)
    below = flat.kthvalue(int(rank) + 1).values
    if int((flat <= below).sum()) > int(rank) + 1 or int(rank) + 1 == flat.numel():
        return below
    above = flat[flat > below].min()
    return torch.lerp(below, above, rank - int(rank))
