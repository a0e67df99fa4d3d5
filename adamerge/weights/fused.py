"""The merge of many layers and its gradient in a handful of GPU launches.

What `storage.merge` and `storage.contract` do layer by layer, in a launch or two for all layers:
on a GPU hundreds of small launches take longer than the arithmetic.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from adamerge.weights.fused_plan import BLOCK, Kind, Plan, plan
from adamerge.weights.storage import Layer

log = logging.getLogger("adamerge")

R = TypeVar("R")

DEVICES = {"cuda"}  # on a CPU the kernels run in Triton's interpreter alone: for tests
_OUTPUTS = (None, torch.float32, torch.bfloat16, torch.float16)
_SUMMED = 128  # blocks of a layer added up at a time

_failed = False


def usable(bases: Sequence[Tensor], layers: Sequence[Layer]) -> Plan | None:
    """The tables of these layers; None where the kernels do not take them: only float32 θ0, all on
    one GPU, and if Triton is there."""
    if _failed or bases[0].device.type not in DEVICES or not _has_triton():
        return None
    return plan(bases, layers)


def merge(
    bases: Sequence[Tensor], layers: Sequence[Layer], columns: Tensor, dtype: torch.dtype | None
) -> list[Tensor] | None:
    """`θ0 + Σ_t columns[t, l] τ_t` of every layer l, summed in float32 and rounded once.

    Args:
        columns: `[T, l]` of any floating-point type, on the device of the layers; read there.
        dtype: of the merged matrices; None: float32, as vectors always.

    Returns:
        contiguous tensors that share two allocations (vectors, matrices), or None where the
        kernels cannot be used.
    """
    shape = len(layers[0].values), len(bases)
    if dtype not in _OUTPUTS or columns.shape != shape or columns.device != bases[0].device:
        return None
    return _tried(lambda tables: _merge(tables, columns, dtype), bases, layers)


def contract(
    grads: Sequence[Tensor | None], bases: Sequence[Tensor], layers: Sequence[Layer]
) -> Tensor | None:
    """`⟨grad_l, τ_t,l⟩`, float32 `[T, l]`, 0 for layers without a gradient; None as in `merge`.

    Deterministic: sums of blocks, then of the blocks of a layer, each in a fixed order.
    """
    if any(g is not None and g.shape != b.shape for g, b in zip(grads, bases, strict=True)):
        return None
    return _tried(lambda tables: _contract(tables, grads), bases, layers)


def _tried(work: Callable[[Plan], R], bases: Sequence[Tensor], layers: Sequence[Layer]) -> R | None:
    """`work` with the tables; None where there are none, and for good once a kernel failed."""
    global _failed
    device = bases[0].device
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with here:
            tables = usable(bases, layers)
            return None if tables is None else work(tables)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, an old driver or GPU: a run must not die of it
        _failed = True
        log.warning(
            "the fused kernels do not run here, so layers are merged one by one: %s: %s",
            type(error).__name__,
            error,
        )
        return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _merge(tables: Plan, columns: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    from adamerge.weights import fused_kernels

    device = tables.layers.device
    vectors, matrices = tables.sizes
    outputs = (
        torch.empty(vectors, dtype=torch.float32, device=device),
        torch.empty(matrices, dtype=dtype or torch.float32, device=device),
    )
    for kind in tables.kinds:
        output = outputs[kind.matrices]
        fused_kernels.merge[(len(kind.blocks),)](
            *(tables.layers, kind.blocks, columns, *columns.stride(), output),
            **_settings(tables, kind),
        )
    # `.data`: tensors of their own for autograd. Views would share one count of changes in place,
    # and a change of one would be taken for a change of all.
    return [
        outputs[out.matrix].as_strided(out.shape, out.strides, out.place).data
        for out in tables.outputs
    ]


def _contract(tables: Plan, grads: Sequence[Tensor | None]) -> Tensor:
    from adamerge.weights import fused_kernels

    device = tables.layers.device
    types = {grad.dtype for grad in grads if grad is not None}
    half = torch.float16 if torch.float16 in types else torch.bfloat16
    # Referenced until everything is launched: copies that are made here would be freed too early.
    read = [None if grad is None else _readable(grad, half) for grad in grads]
    addresses = _addresses(read, half, device)
    total = sum(len(kind.blocks) for kind in tables.kinds)
    parts = torch.empty((max(total, 1), tables.tasks), dtype=torch.float32, device=device)
    first = 0
    for kind in tables.kinds:
        fused_kernels.contract[(len(kind.blocks),)](
            *(tables.layers, kind.blocks, addresses, len(grads), parts[first:]),
            HALF=fused_kernels.TYPES[half],
            **_settings(tables, kind),
        )
        first += len(kind.blocks)
    out = torch.empty((tables.tasks, len(grads)), dtype=torch.float32, device=device)
    fused_kernels.add_up[(len(grads),)](
        *(parts, tables.ranges, out, len(grads)),
        TASKS=tables.tasks,
        WIDTH=1 << (tables.tasks - 1).bit_length(),
        ROWS=_SUMMED,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _settings(tables: Plan, kind: Kind) -> dict[str, Any]:
    """What the kernels of the merge and of its gradient are compiled for."""
    from adamerge.weights.fused_kernels import TYPES

    return {
        "TASKS": tables.tasks,
        "STORED": TYPES[kind.stored],
        "SCALED": kind.stored == torch.int8,
        "BLOCK": BLOCK,
        "GROUP": kind.group,
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


def _readable(grad: Tensor, half: torch.dtype) -> Tensor:
    """A gradient as the kernels read it: contiguous, aligned, float32 or `half`."""
    if grad.dtype not in (torch.float32, half):
        grad = grad.float()
    grad = grad.contiguous()
    return grad.clone() if grad.data_ptr() % 16 else grad


def _addresses(grads: Sequence[Tensor | None], half: torch.dtype, device: torch.device) -> Tensor:
    """int64 `[2, l]`: where float32 gradients are, and those in `half`; 0 where there is none.

    The copy to the GPU waits for nothing: its pinned memory is kept until it is over.
    """
    rows = [
        [0 if grad is None or grad.dtype != dtype else grad.data_ptr() for grad in grads]
        for dtype in (torch.float32, half)
    ]
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)
