"""What every objective is: a value per task of a step's features, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders import rows
from adamerge.learn.classifiers import TaskHeads, as_heads
from adamerge.learn.losses import promote

AnyHeads = TaskHeads | Mapping[str, nn.Module] | nn.ModuleDict


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
        sees_labels: whether its `targets` are the true labels `[B]`.
    """

    additive = False
    traces = False
    sees_image_ids = False
    sees_labels = False

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
        if not any(self.weights.values()):
            raise AdamergeError(
                "objective.weights are 0 for every task, so that nothing is learned: give at least "
                "one above 0"
            )

    def term(self, logits: Tensor) -> Tensor:
        """The loss of one task's images, `[B_t, C_t] -> []`."""
        raise AdamergeError(
            f"{type(self).__name__} has no term(): give one that turns the logits [B, C] of a "
            "task's images into its loss [], or value() for one of features"
        )

    def begin_step(self, number: int) -> None:
        """Called before step `number` (from 0), for what changes over the steps: here, nothing."""

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
