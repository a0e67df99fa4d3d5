"""The loss of true labels: the one objective that is not label-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.learn.losses import promote
from adamerge.learn.objectives.base import AnyHeads, Objective


class Labels(Objective):
    """Mean cross-entropy to the true labels per task, in nats, summed over tasks.

    The labels `[B]`, int64, are the `targets` of a step. Under `protocol=paper` the images adapted
    on are those that are scored: a configuration is refused there unless it sets `scored_images`,
    and results and cards say that labels were used.

    Args:
        scored_images: whether to learn from the labels of the very images that are scored.
    """

    additive = sees_labels = True

    def __init__(
        self,
        heads: AnyHeads,
        scored_images: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(heads, weights)
        self.scored_images = scored_images

    def value(self, features: Tensor, task: str, targets: Tensor | None) -> Tensor:
        assert targets is not None
        logits = promote(self.heads.logits(features, task))
        return nn.functional.cross_entropy(logits, targets.to(logits.device))

    def targets(self, images: Any, task_ids: Tensor) -> Tensor:
        raise AdamergeError(
            "the objective compares with true labels, which images do not tell: give them as "
            "targets [B] to step_loss, or run train.py, which reads those of the suite"
        )
