"""The blocks of a method's towers through torch.compile, while it learns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from adamerge.compat import is_failed_compilation, undo_compile
from adamerge.errors import AdamergeError
from adamerge.methods.base import MergeMethod
from adamerge.towers import resblocks, towers_of

BACKEND = "inductor"  # of torch.compile; it needs a C++ compiler on a CPU, and Triton on a GPU


@contextlib.contextmanager
def compiled(method: MergeMethod, wanted: bool = True) -> Iterator[None]:
    """While open, the blocks of the method's towers run compiled; each kind of block is compiled
    once, when it first runs, and all blocks of the kind share it.

    The blocks' weights, learned or merged, are inputs of what is compiled, so steps need no new
    compilation; another number of images does. Folds, state dicts and exports are as ever.

    Args:
        method: one that `refuse_compiling` lets pass.
        wanted: nothing is done otherwise.

    Raises:
        AdamergeError: a backbone without `transformer.resblocks`, or a compilation that failed.
    """
    towers = towers_of(method)
    blocks = [block for tower in towers for block in resblocks(tower.skeleton)] if wanted else []
    for block in blocks:
        block.compile(dynamic=False, backend=BACKEND)
    try:
        yield
    except Exception as error:
        if not is_failed_compilation(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise AdamergeError(
            f"the tower could not be compiled ({reason}): set compile=false, or install what "
            "torch.compile needs here, a C++ compiler or Triton"
        ) from error
    finally:
        for block in blocks:
            undo_compile(block)


def refuse_compiling(method: MergeMethod) -> None:
    """Raises AdamergeError for a method that changes or reads what is inside its tower."""
    if method.looks_inside:
        raise AdamergeError(
            "compile=true leaves nothing to look at inside the tower, and "
            f"{type(method).__name__} with these settings does look (method.positions, "
            "method.batch_gate): set compile=false"
        )
