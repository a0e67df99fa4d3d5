"""How task vectors are kept: in which type, in which place, and the arithmetic on what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.weights.storage_kinds import DTYPES, PLACES

_LEVELS = 127  # int8 holds −127 … 127
_AT_ONCE = 2**19  # numbers made float at a time: as few as stay in a processor's cache


@dataclass(frozen=True)
class Storage:
    """Where and in which type task vectors are kept.

    Args:
        dtype: of matrices: `float32` (as they were computed), `bfloat16`, or `int8` with one
            float32 scale per task and output row. Vectors and scalars stay as they were computed.
        device: `auto` keeps them in memory and moves them along with the method; `cuda` is the
            same; `host` keeps them in (pinned) memory whatever device computes, and `disk` in a
            memory-mapped file: a layer at a time is brought to the device.
        file: for `disk`, the .safetensors file to write.
        pinned: for `host`, whether a GPU of this process will read what is kept.

    Raises:
        AdamergeError: an unknown type or place, or `disk` without a file.
    """

    dtype: str = "float32"
    device: str = "auto"
    file: Path | None = None
    pinned: bool = True

    def __post_init__(self) -> None:
        for key, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("device", self.device, PLACES),
        ):
            if value not in known:
                raise AdamergeError(
                    f"task_vectors.{key} is {value!r}: expected one of {', '.join(known)}"
                )
        if self.device == "disk" and self.file is None:
            raise AdamergeError(
                "task vectors are to be kept on disk, but no file is named: give Storage(file=…)"
            )

    @property
    def stays(self) -> bool:
        """Whether task vectors stay where they are when the method moves to another device."""
        return self.device in ("host", "disk")


@dataclass(frozen=True)
class Layer:
    """τ of one layer as it is kept: `τ = values`, or `scales · values` row by row.

    Attributes:
        values: `[T, *shape]`, float64, float32, bfloat16 or int8.
        scales: `[T, shape[0]]` with int8, else None.
    """

    values: Tensor
    scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def to(self, device: torch.device) -> Layer:
        """The same on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def moved(self, fn: Callable[[Tensor], Tensor], like: Tensor, device: torch.device) -> Layer:
        """Mapped by `fn` where it is kept in the type of `like`; else on the device, in its own."""
        whole = self.scales is None and self.values.dtype == like.dtype
        return self.map(fn) if whole else self.to(device)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Layer:
        """`fn` of every tensor."""
        return Layer(fn(self.values), None if self.scales is None else fn(self.scales))

    def dense(self, like: Tensor) -> Tensor:
        """τ `[T, *shape]` in the type and on the device of `like`; not copied where it is so."""
        return _dense(self.values, self.scales, like)

    def row(self, task: int, like: Tensor) -> Tensor:
        """τ_t `[*shape]` of one task, likewise."""
        scales = None if self.scales is None else self.scales[task : task + 1]
        return _dense(self.values[task : task + 1], scales, like)[0]

    def rows(self, start: int, stop: int) -> Layer:
        """Rows of the first dimension of `shape` alone, not copied; a scalar has one row."""
        if self.values.ndim == 1:
            return self
        scales = None if self.scales is None else self.scales[:, start:stop]
        return Layer(self.values[:, start:stop], scales)

    def pieces(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """τ dense, a few rows at a time: places in the flattened layer, and `[T, places]`.

        What needs no change of type or device comes in one piece, not copied.
        """
        values, tasks = self.values, len(self.values)
        if self.scales is None and values.dtype == like.dtype and values.device == like.device:
            yield slice(0, like.numel()), values.reshape(tasks, -1)
            return
        width = max(like.numel() // max(len(values[0]), 1), 1) if values.ndim > 1 else 1
        height = like.numel() // width
        step = max(_AT_ONCE // (tasks * width), 1)
        for start in range(0, max(height, 1), step):
            stop = min(start + step, height)
            part = self.rows(start, stop).dense(like)
            yield slice(start * width, stop * width), part.reshape(tasks, -1)


class Dense(Mapping[str, Tensor]):
    """Dense τ `[T, *shape]` by layer, each made when it is asked for, in the type of `like`."""

    def __init__(self, layers: Mapping[str, Layer], like: Mapping[str, Tensor]) -> None:
        self._layers, self._like = layers, like

    def __getitem__(self, name: str) -> Tensor:
        return self._layers[name].dense(self._like[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)


def keep(deltas: Tensor, dtype: str) -> Layer:
    """τ `[T, *shape]` of a layer in the type it is to be kept in.

    int8: `scale = max |τ| / 127` over the entries of one task's output row (one index of the first
    dimension), `value = round(τ / scale)`, so that every entry is off by at most `scale / 2`.
    Layers of fewer than two dimensions are kept as they are.
    """
    if dtype == "float32" or deltas.ndim < 3:
        return Layer(deltas)
    if dtype == "bfloat16":
        return Layer(deltas.to(torch.bfloat16))
    rows = deltas.flatten(2)
    scales = (
        rows.abs().amax(2).div_(_LEVELS).float() if rows.numel() else rows.new_zeros(rows.shape[:2])
    )
    levels = torch.where(scales > 0, scales, 1).to(deltas)
    values = (deltas / _spread(levels, deltas)).round_().clamp_(-_LEVELS, _LEVELS)
    return Layer(values.to(torch.int8), scales)


def merge(base: Tensor, layer: Layer, column: Tensor) -> Tensor:
    """`θ0 + Σ_t column[t] τ_t` of one layer, `[T] -> [*shape]`, like `base`."""
    merged, flat = torch.empty_like(base, memory_format=torch.contiguous_format), base.reshape(-1)
    for places, deltas in layer.pieces(base):
        torch.addmv(flat[places], deltas.T, column, out=merged.view(-1)[places])
    return merged


def contract(grad: Tensor, layer: Layer, like: Tensor) -> Tensor:
    """`⟨grad, τ_t⟩` of one layer for every task, `[*shape] -> [T]`, in the type of `like`."""
    flat = grad.to(like.dtype).reshape(-1)
    parts = [torch.mv(deltas, flat[places]) for places, deltas in layer.pieces(like)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _dense(values: Tensor, scales: Tensor | None, like: Tensor) -> Tensor:
    dense = values.to(like.device, like.dtype)
    return dense if scales is None else dense.mul_(_spread(scales.to(like), dense))


def _spread(scales: Tensor, values: Tensor) -> Tensor:
    """`[T, rows] -> [T, rows, 1, …]`."""
    return scales.view(*scales.shape, *[1] * (values.ndim - 2))
