"""Triton kernels of the merge of many layers and its gradient; `fused` decides when they run.

A program works on `BLOCK` neighbouring numbers of one layer, `GROUP` at a time: 16 where everything
begins at multiples of 16 numbers, so that a thread reads 16 bytes at once and a group lies in one
row, 1 elsewhere. Two tables say which: `blocks`, `[programs, 2]` (layer, first number), and
`layers`, `[l, 6]` (addresses of θ0, τ and its scales, first number of the output, numbers of a
layer, of a row). No program waits for another, and none adds to what another wrote: the same
numbers give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


@triton.jit
def _number(table: tl.tensor, index: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    number = tl.load(table + index)
    if GROUP > 1:
        number = tl.multiple_of(number, GROUP)
    return number


@triton.jit
def _pointer(
    table: tl.tensor, index: tl.tensor, TYPE: tl.constexpr, GROUP: tl.constexpr
) -> tl.tensor:
    pointer = tl.load(table + index).to(tl.pointer_type(TYPE))
    if GROUP > 1:
        pointer = tl.multiple_of(pointer, 16)  # bytes
    return pointer


@triton.jit
def _place(
    layers: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The layer of this program, its row in the table, its numbers, and where groups of them and
    each of them lie."""
    index = tl.program_id(0)
    layer = tl.load(blocks + 2 * index)
    start = _number(blocks, 2 * index + 1, GROUP)
    row = layers + layer * 6
    groups = start + tl.arange(0, BLOCK // GROUP) * GROUP
    places = groups[:, None] + tl.arange(0, GROUP)[None, :]
    return layer, row, _number(row, 4, GROUP), groups, places


@triton.jit
def _scales(
    row: tl.tensor, numel: tl.tensor, groups: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A layer's scales, how many of them each task has, and which belong to these groups."""
    width = tl.load(row + 5).to(tl.int32)
    rows = groups // width
    scales = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    return scales, numel // width, rows


@triton.jit
def merge(
    layers: tl.tensor,
    blocks: tl.tensor,
    columns: tl.tensor,
    task_stride: tl.tensor,
    layer_stride: tl.tensor,
    out: tl.tensor,
    TASKS: tl.constexpr,
    STORED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """`out` = θ0 + Σ_t columns[t, l] τ_t of every block, `columns` `[T, l]` of any strides."""
    layer, row, numel, groups, places = _place(layers, blocks, BLOCK, GROUP)
    there = groups < numel
    mask = there[:, None]
    values = _pointer(row, 1, STORED, GROUP)
    merged = tl.load(_pointer(row, 0, tl.float32, GROUP) + places, mask=mask, other=0.0)
    if SCALED:
        scales, height, rows = _scales(row, numel, groups)
    for task in range(TASKS):
        weight = tl.load(columns + task * task_stride + layer * layer_stride).to(tl.float32)
        tau = tl.load(values + task * numel + places, mask=mask, other=0).to(tl.float32)
        if SCALED:
            scale = tl.load(scales + task * height + rows, mask=there, other=0.0)
            merged += (weight * scale)[:, None] * tau
        else:
            merged += weight * tau
    first = _number(row, 3, GROUP)
    tl.store(out + first + places, merged.to(out.dtype.element_ty), mask=mask)


@triton.jit
def contract(
    layers: tl.tensor,
    blocks: tl.tensor,
    grads: tl.tensor,
    count: tl.tensor,
    parts: tl.tensor,
    TASKS: tl.constexpr,
    STORED: tl.constexpr,
    SCALED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """`parts` `[blocks, T]` = ⟨grad, τ_t⟩ of every block.

    `grads` `[2, l]`, l = `count`: addresses of float32 gradients, and of those in `HALF`; 0 where
    there is none: nothing of it is read, and the sums are 0.
    """
    layer, row, numel, groups, places = _place(layers, blocks, BLOCK, GROUP)
    in_full = groups < tl.where(tl.load(grads + layer) != 0, numel, 0)
    in_half = groups < tl.where(tl.load(grads + count + layer) != 0, numel, 0)
    there = in_full | in_half
    full = _pointer(grads, layer, tl.float32, GROUP) + places
    half = _pointer(grads, count + layer, HALF, GROUP) + places
    grad = tl.load(full, mask=in_full[:, None], other=0.0)
    grad += tl.load(half, mask=in_half[:, None], other=0.0).to(tl.float32)
    values = _pointer(row, 1, STORED, GROUP)
    if SCALED:
        scales, height, rows = _scales(row, numel, groups)
    for task in range(TASKS):
        tau = tl.load(values + task * numel + places, mask=there[:, None], other=0).to(tl.float32)
        sums = tl.sum(grad * tau, axis=1)
        if SCALED:
            sums *= tl.load(scales + task * height + rows, mask=there, other=0.0)
        tl.store(parts + tl.program_id(0) * TASKS + task, tl.sum(sums, axis=0))


@triton.jit
def add_up(
    parts: tl.tensor,
    ranges: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    TASKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """`out` `[T, l]`, l = `count`: the sum of each layer's `parts`, from `ranges[l, 0]` to
    `ranges[l, 1]`, `ROWS` at a time; `WIDTH` is T or the next power of 2."""
    layer = tl.program_id(0)
    first = tl.load(ranges + 2 * layer)
    last = tl.load(ranges + 2 * layer + 1)
    tasks = tl.arange(0, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < last)[:, None] & (tasks < TASKS)[None, :]
        total += tl.load(parts + rows[:, None] * TASKS + tasks[None, :], mask=mask, other=0.0)
    tl.store(out + tasks * count + layer, tl.sum(total, axis=0), mask=tasks < TASKS)
