"""Losses of the merged model's own predictions: nothing but unlabeled images is needed."""

from __future__ import annotations

from torch import Tensor

from adamerge.learn.losses import entropy, infomax
from adamerge.learn.objectives.base import Objective


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
