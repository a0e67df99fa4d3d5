"""Label-free losses, in nats: pure functions of logits, and their per-task form for training.

An objective is called with the features and task ids of a whole step and returns one value per
task; the loss is their (weighted) sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from adamerge.errors import AdamergeError


def sample_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of each prediction, `[B, C] -> [B]`, exact (log-softmax), in nats.

    Half-precision logits are promoted to float32 first.
    """
    log_probabilities = _promote(logits).log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """Mean prediction entropy of a batch, `[B, C] -> []`, in nats.

    The objective of AdaMerging: Adaptive Model Merging for Multi-Task Learning (arXiv 2310.02575).
    """
    return sample_entropy(logits).mean()


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the batch's mean prediction, `[B, C] -> []`, in nats.

    Under torch.distributed the mean is taken over all ranks (equal batches on each), while the
    gradient is this rank's share, so that averaging gradients over ranks gives the whole one.
    A mean over n images underestimates the entropy by up to about (C − 1) / 2n nats: with few
    images per class the marginal is biased, the same way at every step.
    """
    mean = _promote(logits).softmax(-1).mean(0)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        everywhere = mean.detach().clone()
        dist.all_reduce(everywhere)
        mean = everywhere / dist.get_world_size() + (mean - mean.detach())
    return -torch.special.xlogy(mean, mean.clamp_min(torch.finfo(mean.dtype).tiny)).sum()


def infomax(logits: Tensor) -> Tensor:
    """Mean entropy minus entropy of the mean prediction, `[B, C] -> []`, in nats.

    The information-maximisation loss of Do We Really Need to Access the Source Data? (SHOT, arXiv
    2002.08546): predictions are to be certain one by one and diverse together, which forbids the
    collapse onto few classes that entropy alone rewards.
    """
    return entropy(logits) - marginal_entropy(logits)


class TaskHeads(Protocol):
    """What an objective asks of the heads (see `adamerge.heads.Heads`)."""

    @property
    def tasks(self) -> Sequence[str]: ...

    def logits(self, features: Tensor, task: str) -> Tensor: ...


class Objective:
    """Base of the losses over tasks: sums `weights[task] * term(logits of the task's images)`.

    Args:
        heads: gives `logits(features, task)` and the order of the tasks.
        weights: factor per task; tasks left out have 1.

    Attributes:
        additive: whether a task's value is a mean over its images, so that a step can be cut into
            micro-batches whose values add up. Others get two passes, see `adaptation.step_loss`.
    """

    additive = False

    def __init__(self, heads: TaskHeads, weights: Mapping[str, float] | None = None) -> None:
        self.heads = heads
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
        raise NotImplementedError

    def __call__(
        self, features: Tensor, task_ids: Tensor, counts: Mapping[int, int] | None = None
    ) -> Tensor:
        """Unweighted value per task, `[T]`; tasks without images have 0.

        Args:
            features: `[B, D]`.
            task_ids: `[B]` integers; keep them on the CPU to spare a GPU synchronisation.
            counts: images per task id in the whole step when this is one micro-batch of it
                (additive objectives only): values then add up over the micro-batches.
        """
        ids = task_ids.cpu()
        values = []
        for index, task in enumerate(self.heads.tasks):
            rows = (ids == index).nonzero().squeeze(1)
            if len(rows) == 0:
                values.append(_promote(features.new_zeros(())))
                continue
            value = self.term(self.heads.logits(_pick(features, rows), task))
            values.append(value if counts is None else value * (len(rows) / counts[index]))
        return torch.stack(values)

    def weigh(self, values: Tensor) -> Tensor:
        """The loss `Σ_t weight_t · value_t` of the `[T]` values of a call."""
        terms = zip(values.unbind(), self.heads.tasks, strict=True)
        return torch.stack([self.weights[task] * value for value, task in terms]).sum()


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


def _pick(features: Tensor, rows: Tensor) -> Tensor:
    """Rows of features; a run of neighbours, as in training, needs no index on the device."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        return features[first : last + 1]
    return features[rows.to(features.device)]


def _promote(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
