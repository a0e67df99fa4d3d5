"""How a step moves what is learned: all together, by tasks, by blocks, in two levels, or by SAM.

An update is called once a step. It may ask for gradients several times and move several times; it
keeps nothing from one step to the next, so that a resumed run needs only the step's number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from adamerge._base.binding import nearest
from adamerge._base.errors import AdamergeError
from adamerge.encoders.tower import block_of
from adamerge.methods.base import MergeMethod


@dataclass(frozen=True)
class Part:
    """Which of a step's images a loss is of: those of one task (its index) alone, every second one
    of each task (from the first, half 0, or the second, half 1); by default all."""

    task: int | None = None
    half: int | None = None

    def of(self, rows: Tensor) -> Tensor:
        """Of rows of one task's images those in the half."""
        return rows if self.half is None else rows[self.half :: 2]


# The loss of some of the step's images, at the learnables as they are now: `[]`. Fills their
# gradients anew.
Compute = Callable[[Part], Tensor]
# One step of the optimizer, which is given what computes the loss and the gradients.
Move = Callable[[Callable[[], Tensor]], Any]


@dataclass(frozen=True)
class Step:
    """What an update works with.

    Attributes:
        compute: fills the gradients.
        move: the optimizer's step.
        learned: the learnables of method and objective.
        tasks: T.
        number: of the step, from 0.
        method: what is learned.
    """

    compute: Compute
    move: Move
    learned: Sequence[Tensor]
    tasks: int
    number: int
    method: MergeMethod = field(default_factory=MergeMethod)


class Update(Protocol):
    """How a step moves the learnables."""

    def __call__(self, step: Step) -> None:
        """Takes a step."""
        ...


@dataclass(frozen=True)
class Joint:
    """All tasks together: one gradient, of the sum of their losses."""

    def __call__(self, step: Step) -> None:
        step.move(lambda: step.compute(Part()))


@dataclass(frozen=True)
class PerTask:
    """One task after another: the optimizer moves T times a step, each time by one task's loss.

    What a task's loss does not depend on, as another task's head, is not moved.

    Args:
        order: `fixed`, that of the suite, or `shuffled` anew at every step.
        seed: of the shuffling, along with the step's number.
    """

    order: Literal["fixed", "shuffled"] = "fixed"
    seed: int = 0

    def __post_init__(self) -> None:
        known = ("fixed", "shuffled")
        _check("order", self.order, self.order in known, "'fixed' or 'shuffled'")

    def __call__(self, step: Step) -> None:
        order = list(range(step.tasks))
        if self.order == "shuffled":
            order = np.random.default_rng([self.seed, step.number]).permutation(order).tolist()
        for task in order:
            step.move(lambda task=task: step.compute(Part(task)))  # type: ignore[misc]


@dataclass(frozen=True)
class Sam:
    """Sharpness-aware minimisation: the gradient at `x + push` moves x. Two passes a step.

    Sharpness-Aware Minimization for Efficiently Improving Generalization (arXiv 2010.01412):
    `push = rho · g / ‖g‖`, with g the gradient at x and the norm over all learnables. Adaptive
    (ASAM, arXiv 2102.11600): `push = rho · x² ∘ g / ‖|x| ∘ g‖`. There the push of a learnable that
    is 0 is 0: from merging coefficients of 0 the adaptive update begins as the plain optimizer.

    Args:
        rho: the length of the push, in units of the learnables; relative to them if adaptive.
        adaptive: whether it is.
    """

    rho: float = 0.05
    adaptive: bool = False

    def __post_init__(self) -> None:
        _check("rho", self.rho, _is_positive(self.rho))
        _check("adaptive", self.adaptive, isinstance(self.adaptive, bool), "true or false")

    def __call__(self, step: Step) -> None:
        def pushed() -> Tensor:
            loss = step.compute(Part())
            with restored(step.learned):
                self.push(step.learned)
                step.compute(Part())
            return loss

        step.move(pushed)

    @torch.no_grad()
    def push(self, learned: Sequence[Tensor]) -> Tensor:
        """Adds the push to the learnables, by their gradients; its norm, `[]`."""
        moved = [tensor for tensor in learned if tensor.grad is not None]
        sizes = [t.abs() if self.adaptive else torch.ones_like(t) for t in moved]
        slopes = [a * t.grad for a, t in zip(sizes, moved, strict=True) if t.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([slope.norm() for slope in slopes]))
        pushes = [a * g * (self.rho / (norm + 1e-12)) for a, g in zip(sizes, slopes, strict=True)]
        for tensor, push in zip(moved, pushes, strict=True):
            tensor.add_(push)
        return torch.linalg.vector_norm(torch.stack([push.norm() for push in pushes]))


@dataclass(frozen=True)
class Bilevel:
    """Two levels: what is learned above is moved for what one step below would make of it.

    At every step those learnables x that the method has below (`MergeMethod.below`: of `Concrete`
    the merging coefficients) move by plain gradient descent on one half of every task's images,
    `x' = x − inner_lr · g`; the optimizer moves all others by the gradient at x' on the other half;
    and x is put back. As Concrete Subspace Learning (arXiv 2312.06173) learns its masks.
    Where the method has nothing below, as in Concrete's second phase, it is the joint update.

    Args:
        inner_lr: the learning rate below.
    """

    inner_lr: float = 0.1

    def __post_init__(self) -> None:
        _check("inner_lr", self.inner_lr, _is_positive(self.inner_lr))

    def __call__(self, step: Step) -> None:
        below = step.method.below

        def above() -> Tensor:
            step.compute(Part(half=0))
            with restored(below), torch.no_grad():
                for tensor in below:
                    if tensor.grad is not None:
                        tensor.sub_(tensor.grad, alpha=self.inner_lr)
                with torch.enable_grad():
                    loss = step.compute(Part(half=1))
            for tensor in below:
                tensor.grad = None
            return loss

        step.move(above if below else lambda: step.compute(Part()))


@dataclass(frozen=True)
class Progressive:
    """One block after the other: at a step the merged weights of one block alone are learned.

    A block is what names of layers begin with up to their first number, `transformer.resblocks.3`;
    layers without a number stay as they began. Every block has `inner_steps` steps, the first block
    first, and after the last one it begins again. Learnables, or entries of them, that have no
    gradient in that are not moved, whatever the optimizer's moments. The order of ProDistill (arXiv
    2502.12706), for any method of one network and any objective.

    Args:
        inner_steps: of a block, one after the other.

    Raises:
        AdamergeError: `inner_steps` below 1; on a call, a method whose layers are in no blocks.
    """

    inner_steps: int = 100

    def __post_init__(self) -> None:
        fine = type(self.inner_steps) is int and self.inner_steps > 0
        _check("inner_steps", self.inner_steps, fine, "a whole number, at least 1")

    def __call__(self, step: Step) -> None:
        blocks = blocks_of(step.method)
        block = blocks[step.number // self.inner_steps % len(blocks)]
        before = [tensor.detach().clone() for tensor in step.learned]
        grads: list[Tensor | None] = []

        def own() -> Tensor:
            loss = step.compute(Part())
            grads[:] = [None if t.grad is None else t.grad.clone() for t in step.learned]
            return loss

        step.method.learned_layers = lambda name: block_of(name) == block
        try:
            step.move(own)
        finally:
            step.method.learned_layers = None
        with torch.no_grad():
            for tensor, grad, kept in zip(step.learned, grads, before, strict=True):
                if grad is not None:
                    tensor.copy_(torch.where(grad == 0, kept, tensor))


def blocks_of(method: MergeMethod) -> list[str]:
    """The blocks of a method's layers, in order.

    Raises:
        AdamergeError: there are none.
    """
    vectors = vars(method).get("task_vectors")
    found = dict.fromkeys(map(block_of, () if vectors is None else vectors.names))
    blocks = [block for block in found if block[-1:].isdigit()]
    if not blocks:
        raise AdamergeError(
            f"update=progressive goes through the blocks of a network, and {type(method).__name__} "
            "merges no layers with numbers in their names: use update=joint"
        )
    return blocks


@contextlib.contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Puts the values back that tensors have on the way in; their gradients stay."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, kept in zip(tensors, before, strict=True):
                tensor.copy_(kept)


_KINDS: dict[str, type[Any]] = {
    "joint": Joint,
    "per_task": PerTask,
    "sam": Sam,
    "bilevel": Bilevel,
    "progressive": Progressive,
}


def update_of(settings: Mapping[str, Any] | str, seed: int = 0) -> Update:
    """The update of that name, or of `name` and the settings beside it; draws by the seed.

    >>> update_of({"name": "sam", "rho": 0.1})
    Sam(rho=0.1, adaptive=False)

    Raises:
        AdamergeError: another name, an unknown setting, or one out of range.
    """
    known: dict[str, Any] = {"name": settings} if isinstance(settings, str) else dict(settings)
    name = known.pop("name", None)
    _check("name", name, name in list(_KINDS), ", ".join(_KINDS))
    own = {n: [f.name for f in fields(kind)] for n, kind in _KINDS.items()}
    settable = {key for keys in own.values() for key in keys} - {"seed"}
    for key in known.keys() - settable:
        raise AdamergeError(f"update.{key} is unknown{nearest(key, settable)}")
    known["seed"] = seed
    made = {n: kind(**{k: known[k] for k in own[n] if k in known}) for n, kind in _KINDS.items()}
    found: Update = made[name]
    return found


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value is not True and 0 < value < math.inf


def _check(key: str, value: Any, fine: bool, expected: str = "a finite number > 0") -> None:
    if not fine:
        raise AdamergeError(f"update.{key} is {value!r}: expected {expected}")
