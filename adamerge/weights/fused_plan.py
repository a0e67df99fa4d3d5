"""Tables of addresses for the fused kernels: where every layer of a group lies, and its blocks.

They hold numbers, no tensor: what they point at is freed as if they were not, and when an address
changes, other tables are made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adamerge.weights.storage import Layer

BLOCK = 4096  # numbers of one program
_GROUP = 16  # numbers read together where every place allows it
_APART = 64  # outputs begin at multiples of that many numbers: of at least 128 bytes
_MOST = 2**31 - BLOCK  # numbers of a layer, counted in 32 bits
_PLANS = 1024  # tables kept: those of all groups, where τ comes to the GPU group by group
_STORED = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class Kind:
    """Layers that one launch works on."""

    stored: torch.dtype  # of τ
    matrices: bool  # whether they have two dimensions or more
    group: int  # numbers read together
    blocks: Tensor  # int32 [programs, 2]: layer, first number


class Output(NamedTuple):
    """Where a layer's merged tensor lies in the store of all vectors, or of all matrices."""

    matrix: bool
    shape: torch.Size
    strides: tuple[int, ...]
    place: int


@dataclass(frozen=True)
class Plan:
    """Tables of a group of l layers, on their device."""

    tasks: int
    layers: Tensor  # int64 [l, 6], as the kernels read it
    ranges: Tensor  # int32 [l, 2]: first and last block of each layer, over all kinds
    kinds: list[Kind]  # what is launched
    outputs: list[Output]  # one for each layer
    sizes: tuple[int, int]  # numbers of all outputs that are vectors, and that are matrices


def plan(bases: Sequence[Tensor], layers: Sequence[Layer]) -> Plan | None:
    """The tables of these layers; None where one of them is not for the kernels.

    They take float32 θ0, and τ stored in float32, bfloat16 or int8, contiguous, on one device.
    """
    facts = tuple(_Facts.of(*pair) for pair in zip(bases, layers, strict=True))
    return _planned(facts, bases[0].device) if len({b.device for b in bases}) == 1 else None


class _Facts(NamedTuple):
    """All that the tables depend on, of one layer."""

    base: int
    values: int
    scales: int
    tasks: int
    stored: torch.dtype
    shape: torch.Size
    fits: bool

    @classmethod
    def of(cls, base: Tensor, layer: Layer) -> _Facts:
        values, scales = layer.values, layer.scales
        fits = base.dtype == torch.float32 and values.dtype in _STORED and base.numel() < _MOST
        fits = fits and (scales is None) == (values.dtype != torch.int8)
        fits = fits and (scales is None or scales.dtype == torch.float32)
        for tensor in (base, values) if scales is None else (base, values, scales):
            fits = fits and tensor.is_contiguous() and tensor.device == base.device
        pointers = base.data_ptr(), values.data_ptr(), 0 if scales is None else scales.data_ptr()
        return cls(*pointers, len(values), values.dtype, base.shape, fits)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Numbers of a row; 1 for a vector, each number of which is a row."""
        return max(math.prod(self.shape[1:]), 1)

    @property
    def group(self) -> int:
        """1 where groups of numbers would begin at odd places, or lie in two rows."""
        odd = (self.base | self.values) % 16 or self.numel % _GROUP
        return 1 if odd or (self.scales and self.width % _GROUP) else _GROUP


@functools.lru_cache(maxsize=_PLANS)
def _planned(facts: tuple[_Facts, ...], device: torch.device) -> Plan | None:
    if not all(fact.fits and fact.tasks == facts[0].tasks for fact in facts):
        return None
    sizes, outputs, rows = [0, 0], [], []
    for fact in facts:
        matrix = len(fact.shape) > 1
        place = sizes[matrix]
        sizes[matrix] += -(-fact.numel // _APART) * _APART
        strides = torch.empty(fact.shape, device="meta").stride()
        outputs.append(Output(matrix, fact.shape, strides, place))
        rows.append([fact.base, fact.values, fact.scales, place, fact.numel, fact.width])
    kinds, ranges = _kinds(facts, device)
    tables = _table(device, rows, torch.int64), _table(device, ranges, torch.int32)
    return Plan(facts[0].tasks, *tables, kinds, outputs, (sizes[0], sizes[1]))


def _kinds(
    facts: tuple[_Facts, ...], device: torch.device
) -> tuple[list[Kind], list[tuple[int, int]]]:
    """What is launched, and the range of blocks of every layer."""
    kind_of = [(fact.stored, len(fact.shape) > 1, fact.group) for fact in facts]
    kinds, ranges, total = [], [(0, 0)] * len(facts), 0
    for kind in dict.fromkeys(kind_of):
        indices = [index for index, other in enumerate(kind_of) if other == kind]
        blocks: list[tuple[int, int]] = []
        for index in indices:
            first = total + len(blocks)
            blocks += [(index, start) for start in range(0, facts[index].numel, BLOCK)]
            ranges[index] = first, total + len(blocks)
        total += len(blocks)
        if blocks:
            kinds.append(Kind(*kind, _table(device, blocks, torch.int32)))
    return kinds, ranges


def _table(device: torch.device, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    # Waits for the copy, once: other streams may use the table too.
    return torch.tensor(rows, dtype=dtype).to(device)
