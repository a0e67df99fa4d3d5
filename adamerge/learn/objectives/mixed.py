"""A schedule from one objective to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.learn.objectives.base import AnyHeads, Objective
from adamerge.learn.objectives.taught import ExpertFeatures, ExpertKL, ExpertLabels, Taught, Teacher
from adamerge.learn.objectives.unlabeled import Entropy, InfoMax

_ALONE: dict[str, Callable[..., Objective]] = {"entropy": Entropy, "infomax": InfoMax}
_TAUGHT: dict[str, Callable[..., Objective]] = {
    "expert_kl": ExpertKL,
    "expert_labels": ExpertLabels,
    "features": ExpertFeatures,
}


class Mixed(Taught):
    """`(1 − s) · first + s · then` per task, with s = min(step / steps, 1), steps counted from 0.

    For a start that the experts teach and an end without them, or the other way round.

    Args:
        first: `entropy`, `infomax`, `expert_kl`, `expert_labels`, `features`, each with its own
            defaults; or in Python an objective of features.
        then: likewise.
        steps: until `then` stands alone.
        weights: factor per task, of both.

    Attributes:
        share: s, `[]`.

    Raises:
        AdamergeError: another name, steps below 1, or an objective of traces or image ids.
    """

    share: Tensor

    def __init__(
        self,
        heads: AnyHeads,
        teacher: Teacher,
        first: str | Objective = "expert_kl",
        then: str | Objective = "entropy",
        steps: int = 500,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(heads, teacher, weights)
        if steps < 1:
            raise AdamergeError(f"objective.steps is {steps}: expected at least 1")
        self.steps = steps
        self.first = _part("first", first, self.heads, teacher)
        self.then = _part("then", then, self.heads, teacher)
        self.additive = self.first.additive and self.then.additive
        # A tensor, so that a recorded step reads what it is by then.
        self.register_buffer("share", torch.zeros(()), persistent=False)

    def begin_step(self, number: int) -> None:
        self.share.fill_(min(number / self.steps, 1.0))

    def value(self, features: Tensor, task: str, targets: Tensor | None) -> Tensor:
        first, then = (part.value(features, task, targets) for part in (self.first, self.then))
        return (1 - self.share) * first + self.share * then


def _part(key: str, given: Any, heads: AnyHeads, teacher: Teacher) -> Objective:
    special = isinstance(given, Objective) and (
        given.traces or given.sees_image_ids or given.sees_labels
    )
    if isinstance(given, Objective) and not special:
        return given
    if isinstance(given, Objective) or given not in {**_ALONE, **_TAUGHT}:
        what = f"a {type(given).__name__}" if isinstance(given, Objective) else repr(given)
        raise AdamergeError(
            f"objective.{key} is {what}: expected {', '.join((*_ALONE, *_TAUGHT))}, or an "
            "objective of final features"
        )
    return _ALONE[given](heads) if given in _ALONE else _TAUGHT[given](heads, teacher)
