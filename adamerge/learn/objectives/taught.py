"""Losses against a frozen teacher, usually each task's expert, on the same unlabeled images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.learn.classifiers import TaskHeads
from adamerge.learn.losses import expert_kl, expert_labels, promote
from adamerge.learn.objectives.base import AnyHeads, Objective


class Teacher(Protocol):
    """What an objective asks of a teacher (see `adamerge.encoders.Experts`)."""

    @property
    def widths(self) -> Sequence[int]: ...

    def __call__(self, images: Any, task_ids: Tensor) -> Tensor: ...

    def trace(self, images: Any, task_ids: Tensor) -> Tensor: ...


class Taught(Objective):
    """Base of the losses against a frozen teacher's outputs on the same unlabeled images.

    Args:
        teacher: `(images, task_ids) -> features`, usually `Experts`.
    """

    additive = True

    def __init__(
        self, heads: AnyHeads, teacher: Teacher, weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(heads, weights)
        self._teacher = (teacher,)  # no part of the module: it is frozen, and in no checkpoint

    @property
    def teacher(self) -> Teacher:
        """As given."""
        return self._teacher[0]

    def expert_logits(self, targets: Tensor, task: str) -> Tensor:
        """`[B, C]` of the teacher's features `[B, D]`: by the zero-shot heads, where the heads are
        learned."""
        heads: TaskHeads = getattr(self.heads, "zero_shot", self.heads)
        return heads.logits(targets, task)

    @torch.no_grad()
    def targets(self, images: Any, task_ids: Tensor) -> Tensor:
        teach = self.teacher.trace if self.traces else self.teacher
        return teach(images, task_ids)


class ExpertKL(Taught):
    """`losses.expert_kl` per task, summed over tasks: the experts' predictions are the target.

    It needs no labels, and unlike entropy it cannot confirm the merged model's own mistakes.

    Args:
        temperature: divides the logits of both; above 1 the expert's second choices count more.
    """

    def __init__(
        self,
        heads: AnyHeads,
        teacher: Teacher,
        temperature: float = 1.0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(heads, teacher, weights)
        if not (math.isfinite(temperature) and temperature > 0):
            raise AdamergeError(
                f"objective.temperature is {temperature!r}: expected a finite number > 0"
            )
        self.temperature = temperature

    def value(self, features: Tensor, task: str, targets: Tensor | None) -> Tensor:
        assert targets is not None
        logits, wanted = self.heads.logits(features, task), self.expert_logits(targets, task)
        return expert_kl(logits, wanted, self.temperature)


class ExpertLabels(Taught):
    """`losses.expert_labels` per task, summed over tasks: the class each expert predicts is the
    label.

    With `sure` the objective of SyMerge (arXiv 2412.19098): images where the expert is less sure
    than the merged model, and of another opinion, are left out; where all are, the value is 0. The
    mean is then over the images kept, of the whole step.

    Args:
        sure: leave these out.
    """

    def __init__(
        self,
        heads: AnyHeads,
        teacher: Teacher,
        sure: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(heads, teacher, weights)
        self.sure, self.additive = sure, not sure

    def value(self, features: Tensor, task: str, targets: Tensor | None) -> Tensor:
        assert targets is not None
        logits, wanted = self.heads.logits(features, task), self.expert_logits(targets, task)
        return expert_labels(logits, wanted, self.sure)


class ExpertFeatures(Taught):
    """Mean absolute or squared difference to the expert's features, per task, summed over tasks.

    Features as they come, not normalised.

    Args:
        norm: `l1`, the mean of the absolute differences, or `l2`, of their squares.
        blocks: add, for every block, the same of the token means after it.
    """

    def __init__(
        self,
        heads: AnyHeads,
        teacher: Teacher,
        norm: Literal["l1", "l2"] = "l2",
        blocks: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(heads, teacher, weights)
        if norm not in ("l1", "l2"):
            raise AdamergeError(f"objective.norm is {norm!r}: expected 'l1' or 'l2'")
        self.norm = norm
        self.traces, self.widths = blocks, list(teacher.widths) if blocks else []

    def value(self, features: Tensor, task: str, targets: Tensor | None) -> Tensor:
        assert targets is not None
        off = promote(features) - promote(targets)
        off = off.abs() if self.norm == "l1" else off.square()
        if not self.widths:
            return off.mean()
        sizes = [*self.widths, features.shape[1] - sum(self.widths)]
        return torch.stack([part.mean() for part in off.split(sizes, 1)]).sum()

    def final(self, features: Tensor) -> Tensor:
        return features[:, sum(self.widths) :]


class ExpertL1(ExpertFeatures):
    """`ExpertFeatures` with `norm="l1"`: the objective of Surgery (arXiv 2402.02705), and with
    `blocks` of SurgeryV2 (arXiv 2410.14389)."""

    def __init__(
        self,
        heads: AnyHeads,
        teacher: Teacher,
        blocks: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(heads, teacher, "l1", blocks, weights)
