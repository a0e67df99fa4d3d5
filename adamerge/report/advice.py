"""Label-free signs of how an adaptation will go, or went, and the objective they speak for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adamerge.encoders.heads import Heads
from adamerge.learn.losses import marginal_entropy

AGREEING = 0.5  # below, the merged model is more often wrong than right, by the experts
COLLAPSED = 0.7  # of the experts' own spread over the classes


@dataclass(frozen=True)
class Signs:
    """What a merged encoder says of unlabeled images, beside the experts.

    Attributes:
        agreement: per task, the share of images on which both name the same class.
        spread: per task, the entropy of the mean prediction divided by log C: 1 where the classes
            are named equally often, 0 where one is named always.
        expert_spread: the same of the task's expert.
    """

    agreement: dict[str, float]
    spread: dict[str, float]
    expert_spread: dict[str, float]


@torch.no_grad()
def signs(
    encoder: nn.Module, teacher: nn.Module, heads: Heads, images: Mapping[str, Tensor]
) -> Signs:
    """Signs of an encoder on a few images per task.

    Args:
        encoder, teacher: `(images [B, 3, H, W], task_ids [B]) -> features [B, D]`; the teacher's
            are each task's expert's.
        images: task -> normalised images, on the encoders' device.
    """
    agreement, spread, expert_spread = {}, {}, {}
    for index, task in enumerate(heads.tasks):
        ids = torch.full((len(images[task]),), index)
        mine, expert = (
            heads.logits(run(images[task], ids), task).float() for run in (encoder, teacher)
        )
        scale = math.log(max(mine.shape[1], 2))
        agreement[task] = float((mine.argmax(1) == expert.argmax(1)).double().mean())
        spread[task] = float(marginal_entropy(mine)) / scale
        expert_spread[task] = float(marginal_entropy(expert)) / scale
    return Signs(agreement, spread, expert_spread)


def advice(objective: str, before: Signs | None, after: Signs | None) -> list[str]:
    """Sentences for the report on an objective that trusts the merge's own predictions (entropy,
    infomax); none where all is well.

    Where the merged model is more often wrong than right before it learns, minimising its entropy
    confirms its mistakes, and a mean prediction that narrows while it learns is a task collapsing
    onto few of its classes. The experts' predictions as targets (`expert_kl`) suffer from neither.

    Args:
        objective: the name of the one that was used.
    """
    said = []
    low = {t: v for t, v in before.agreement.items() if v < AGREEING} if before else {}
    if low:
        shares = ", ".join(f"{100 * value:.0f} % ({task})" for task, value in low.items())
        said.append(
            f"before adapting, the merge names the expert's class for {shares} of the images: "
            "where it is more often wrong than right, entropy confirms its mistakes; "
            "objective=expert_kl is the better choice"
        )
    wide = after.expert_spread if after else {}
    narrow = {t: v for t, v in after.spread.items() if v < COLLAPSED * wide[t]} if after else {}
    if narrow:
        values = ", ".join(f"{task} {value:.2f}" for task, value in narrow.items())
        better = [name for name in ("infomax", "expert_kl") if name != objective]
        said.append(
            f"after adapting, predictions have collapsed onto few classes (entropy of the mean "
            f"prediction as a share of log C: {values}; the experts' is above "
            f"{min(wide[t] for t in narrow):.2f}): try objective={' or objective='.join(better)}"
        )
    return said
