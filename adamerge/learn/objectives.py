"""Label-free losses over tasks, for training; as pure functions they are in `losses`.

An objective is called with the features and task ids of a whole step and returns one value per
task; the loss is their (weighted) sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders import rows
from adamerge.learn.classifiers import TaskHeads, as_heads
from adamerge.learn.losses import (
    entropy,
    expert_kl,
    infomax,
    marginal_entropy,
    promote,
    sample_entropy,
)

__all__ = [
    "Entropy",
    "ExpertKL",
    "ExpertL1",
    "InfoMax",
    "Objective",
    "TaskHeads",
    "Teacher",
    "entropy",
    "expert_kl",
    "infomax",
    "marginal_entropy",
    "sample_entropy",
]


AnyHeads = TaskHeads | Mapping[str, nn.Module] | nn.ModuleDict


class Teacher(Protocol):
    """What an objective asks of a teacher (see `adamerge.encoders.Experts`)."""

    @property
    def widths(self) -> Sequence[int]: ...

    def __call__(self, images: Any, task_ids: Tensor) -> Tensor: ...

    def trace(self, images: Any, task_ids: Tensor) -> Tensor: ...


class Objective(nn.Module):
    """Base of the losses over tasks: sums `weights[task] * term(logits of the task's images)`.

    A subclass gives `term`, of logits, or `value`, of features. Parameters of its own (and of its
    heads) that require a gradient are learned along with the method; parameters and buffers are
    saved in checkpoints and move with the module.

    Args:
        heads: a mapping from tasks to classifiers, or what gives `logits(features, task)` and the
            order of the tasks, as zero-shot heads do.
        weights: factor per task; tasks left out have 1.

    Attributes:
        additive: whether a task's value is a mean over its images, so that a step can be cut into
            micro-batches whose values add up. Others get two passes, see `step_loss`.
        traces: whether it takes traces in place of features, see `methods.base.Traced`.
        sees_image_ids: whether `value` is also given `image_ids` `[B_t]`, which of its task's
            images each is: for what is kept of every image.
    """

    additive = False
    traces = False
    sees_image_ids = False

    def __init__(self, heads: AnyHeads, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.heads = heads = as_heads(heads)
        self.weights = {task: 1.0 for task in heads.tasks} | dict(weights or {})
        unknown = sorted(set(self.weights) - set(heads.tasks))
        if unknown:
            raise AdamergeError(
                f"objective.weights names the unknown task {unknown[0]!r}: the tasks are "
                f"{', '.join(heads.tasks)}"
            )
        for task, weight in self.weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (number and math.isfinite(weight) and weight >= 0):
                raise AdamergeError(
                    f"objective.weights.{task} is {weight!r}: expected a finite number >= 0"
                )

    def term(self, logits: Tensor) -> Tensor:
        """The loss of one task's images, `[B_t, C_t] -> []`."""
        raise AdamergeError(
            f"{type(self).__name__} has no term(): give one that turns the logits [B, C] of a "
            "task's images into its loss [], or value() for one of features"
        )

    def value(self, features: Tensor, task: str, targets: Tensor | None) -> Tensor:
        """The loss of one task's images, of their features `[B_t, D]`."""
        return self.term(self.heads.logits(features, task))

    def targets(self, images: Any, task_ids: Tensor) -> Tensor | None:
        """What the features of these images are compared with, a row each; None: nothing."""
        return None

    def final(self, features: Tensor) -> Tensor:
        """The features `[B, D]` in what this objective takes."""
        return features

    def forward(
        self,
        features: Tensor,
        task_ids: Tensor,
        counts: Mapping[int, int] | None = None,
        targets: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> Tensor:
        """Unweighted value per task, `[T]`; tasks without images have 0.

        Args:
            features: `[B, D]`.
            task_ids: `[B]` integers; keep them on the CPU to spare a GPU synchronisation.
            counts: images per task id in the whole step when this is one micro-batch of it
                (additive objectives only): values then add up over the micro-batches.
            targets: what `targets` gave for the same images, where it gives anything.
            image_ids: `[B]`, for objectives that see them.

        Raises:
            AdamergeError: a value that is no single number; image ids that are asked for and not
                given.
        """
        ids = task_ids.cpu()
        found = rows.by_task(features, ids)
        wanted = {} if targets is None else rows.by_task(targets, ids)
        more = self._more(image_ids, ids)
        values = []
        for index, task in enumerate(self.heads.tasks):
            if index not in found:
                values.append(promote(features.new_zeros(())))
                continue
            value = self.value(found[index], task, wanted.get(index), **more.get(index, {}))
            if value.ndim:
                raise AdamergeError(
                    f"{type(self).__name__} gives {list(value.shape)} for the images of task "
                    f"{task!r}: expected one number [], such as their mean"
                )
            values.append(value if counts is None else value * (len(found[index]) / counts[index]))
        return torch.stack(values)

    def _more(self, image_ids: Tensor | None, ids: Tensor) -> dict[int, dict[str, Tensor]]:
        if not self.sees_image_ids:
            return {}
        if image_ids is None:
            raise AdamergeError(
                f"{type(self).__name__} keeps something of every image, and is not told which "
                "images these are: give image_ids [B] with them"
            )
        return {index: {"image_ids": own} for index, own in rows.by_task(image_ids, ids).items()}

    def weigh(self, values: Tensor) -> Tensor:
        """The loss `Σ_t weight_t · value_t` of the `[T]` values of a call."""
        terms = zip(values.unbind(), self.heads.tasks, strict=True)
        return torch.stack([self.weights[task] * value for value, task in terms]).sum()

    def loss(self, values: Tensor) -> Tensor:
        """As `weigh`. Raises AdamergeError if nothing can be learned from it."""
        loss = self.weigh(values)
        if not loss.requires_grad:
            raise AdamergeError(
                f"the loss of {type(self).__name__} depends on nothing that is learned: neither "
                "the method's encode nor the objective may detach what it computes"
            )
        return loss


class Entropy(Objective):
    """`entropy` per task, summed over tasks (arXiv 2310.02575): the papers' objective."""

    additive = True

    def term(self, logits: Tensor) -> Tensor:
        return entropy(logits)


class InfoMax(Objective):
    """`infomax` per task, summed over tasks (arXiv 2002.08546): entropy without its collapses.

    The marginal is estimated over that task's images of the whole step, across ranks and
    micro-batches; give a task with many classes a larger `batch_size`.
    """

    def term(self, logits: Tensor) -> Tensor:
        return infomax(logits)


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
        logits, wanted = self.heads.logits(features, task), self.heads.logits(targets, task)
        return expert_kl(logits, wanted, self.temperature)


class ExpertL1(Taught):
    """Mean absolute difference to the expert's features, per task, summed over tasks.

    The objective of Surgery (arXiv 2402.02705); of SurgeryV2 (arXiv 2410.14389) with `blocks`:
    plus, for every block, the mean absolute difference of the token means after it. Features as
    they come, not normalised.
    """

    def __init__(
        self,
        heads: AnyHeads,
        teacher: Teacher,
        blocks: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(heads, teacher, weights)
        self.traces, self.widths = blocks, list(teacher.widths) if blocks else []

    def value(self, features: Tensor, task: str, targets: Tensor | None) -> Tensor:
        assert targets is not None
        off = (promote(features) - promote(targets)).abs()
        if not self.widths:
            return off.mean()
        sizes = [*self.widths, features.shape[1] - sum(self.widths)]
        return torch.stack([part.mean() for part in off.split(sizes, 1)]).sum()

    def final(self, features: Tensor) -> Tensor:
        return features[:, sum(self.widths) :]
