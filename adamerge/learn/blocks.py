"""The blocks of towers while they learn: compiled, or activations computed again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from adamerge._base.compat import is_failed_compilation, undo_compile
from adamerge._base.errors import AdamergeError, one_line
from adamerge.encoders.fast_paths import attention_for
from adamerge.encoders.tower import resblocks, towers_of
from adamerge.methods.base import MergeMethod

BACKEND = "inductor"  # of torch.compile; it needs a C++ compiler on a CPU, and Triton on a GPU


def refuse_inside(method: MergeMethod, setting: str) -> None:
    """Raises AdamergeError for a method that changes or reads what is inside its tower's blocks.

    Args:
        setting: the one that changes how blocks run, for the message.
    """
    if method.looks_inside:
        raise AdamergeError(
            f"{setting}=true changes how the tower's blocks run, and {type(method).__name__} with "
            "these settings looks inside them (method.positions, method.batch_gate): set "
            f"{setting}=false"
        )


@contextlib.contextmanager
def compiled(method: MergeMethod, wanted: bool = True) -> Iterator[None]:
    """While open, the blocks of the method's towers run compiled; each kind of block is compiled
    once, when it first runs, and all blocks of the kind share it.

    The blocks' weights, learned or merged, are inputs of what is compiled, so steps need no new
    compilation; another number of images does. Folds, state dicts and exports are as ever.

    Args:
        method: one that `refuse_inside` lets pass.
        wanted: nothing is done otherwise.

    Raises:
        AdamergeError: a backbone without `transformer.resblocks`, or a compilation that failed.
    """
    towers = towers_of(method) if wanted else []
    blocks = [block for tower in towers for block in resblocks(tower.skeleton)]
    for block in blocks:
        block.compile(dynamic=False, backend=BACKEND)
    try:
        yield
    except Exception as error:
        if not is_failed_compilation(error):
            raise
        reason = one_line(error)
        raise AdamergeError(
            f"the tower could not be compiled ({reason}): set compile=false, or install what "
            "torch.compile needs here, a C++ compiler or Triton"
        ) from error
    finally:
        for block in blocks:
            undo_compile(block)


def uncompiled(wanted: bool = True) -> contextlib.AbstractContextManager[object]:
    """While open, blocks run as they are written: for what is run too seldom to be compiled."""
    return torch.compiler.set_stance("force_eager") if wanted else contextlib.nullcontext()


@contextlib.contextmanager
def recomputing(method: MergeMethod, wanted: bool = True) -> Iterator[None]:
    """While open, the blocks of the method's towers keep their inputs alone for the backward pass.

    What is between is computed again, block by block: the same numbers, one more forward pass, and
    the memory of one block's activations instead of all.

    Args:
        method: one that `refuse_inside` lets pass.
        wanted: nothing is done otherwise.

    Raises:
        AdamergeError: a backbone without `transformer.resblocks`.
    """
    towers = towers_of(method) if wanted else []
    for tower in towers:
        tower.around = functools.partial(_wrapped, tower.skeleton, resblocks(tower.skeleton))
    try:
        yield
    finally:
        for tower in towers:
            del tower.around  # what its class has is there again


@contextlib.contextmanager
def _wrapped(tower: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
    """For one call, so that copies of the tower made between calls are plain."""
    for block in blocks:
        block.forward = functools.partial(_run, _Plain(block), tower)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class _Plain(nn.Module):
    """A block's own forward, without its hooks: they have run once."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return type(self.block).forward(self.block, *inputs, **named)


def _run(plain: _Plain, tower: nn.Module, hidden: Tensor, *inputs: Any, **named: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return cast(Tensor, plain(hidden, *inputs, **named))
    # The weights that the block stands on now: in the backward pass it has none.
    weights = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    return checkpoint(
        lambda hidden: functional_call(plain, weights, (hidden, *inputs), named),
        hidden,
        use_reentrant=False,
        preserve_rng_state=False,  # frozen towers in evaluation mode draw nothing
        context_fn=lambda: (contextlib.nullcontext(), attention_for(tower, hidden.device)),
    )
