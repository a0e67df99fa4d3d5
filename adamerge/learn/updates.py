"""How a step moves what is learned: all tasks together, one after another, or sharpness-aware.

An update is called once a step. It may ask for gradients several times and move several times; it
keeps nothing from one step to the next, so that a resumed run needs only the step's number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError

# The loss of one task (its index), or of all (None), at the learnables as they are now: `[]`. Fills
# their gradients anew.
Compute = Callable[[int | None], Tensor]
# One step of the optimizer, which is given what computes the loss and the gradients.
Move = Callable[[Callable[[], Tensor]], Any]


class Update(Protocol):
    """How a step moves the learnables."""

    def __call__(
        self, compute: Compute, move: Move, learned: Sequence[Tensor], tasks: int, step: int
    ) -> None:
        """Takes step `step` (from 0).

        Args:
            compute: fills the gradients.
            move: the optimizer's step.
            learned: the learnables.
            tasks: T.
        """
        ...


@dataclass(frozen=True)
class Joint:
    """All tasks together: one gradient, of the sum of their losses."""

    def __call__(
        self, compute: Compute, move: Move, learned: Sequence[Tensor], tasks: int, step: int
    ) -> None:
        move(lambda: compute(None))


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

    def __call__(
        self, compute: Compute, move: Move, learned: Sequence[Tensor], tasks: int, step: int
    ) -> None:
        order = list(range(tasks))
        if self.order == "shuffled":
            order = np.random.default_rng([self.seed, step]).permutation(tasks).tolist()
        for task in order:
            move(lambda task=task: compute(task))  # type: ignore[misc]


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

    def __call__(
        self, compute: Compute, move: Move, learned: Sequence[Tensor], tasks: int, step: int
    ) -> None:
        def pushed() -> Tensor:
            loss = compute(None)
            before = [tensor.detach().clone() for tensor in learned]
            self.push(learned)
            try:
                compute(None)
            finally:
                with torch.no_grad():
                    for tensor, kept in zip(learned, before, strict=True):
                        tensor.copy_(kept)
            return loss

        move(pushed)

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


NAMES = ("joint", "per_task", "sam")


def update_of(settings: Mapping[str, Any] | str, seed: int = 0) -> Update:
    """The update of that name, or of `name`, `order`, `rho` and `adaptive`.

    >>> update_of({"name": "sam", "rho": 0.1})
    Sam(rho=0.1, adaptive=False)

    Args:
        seed: of what it draws.

    Raises:
        AdamergeError: another name, or a setting out of range.
    """
    known: dict[str, Any] = {"name": settings} if isinstance(settings, str) else dict(settings)
    name, order, rho = known.get("name"), known.get("order", "fixed"), known.get("rho", 0.05)
    if name not in NAMES:
        raise AdamergeError(f"update.name is {name!r}: expected {', '.join(NAMES)}")
    if order not in ("fixed", "shuffled"):
        raise AdamergeError(f"update.order is {order!r}: expected 'fixed' or 'shuffled'")
    if not (math.isfinite(rho) and rho > 0):
        raise AdamergeError(f"update.rho is {rho!r}: expected a finite number > 0")
    if name == "per_task":
        return PerTask(order, seed)
    return Sam(float(rho), bool(known.get("adaptive", False))) if name == "sam" else Joint()
