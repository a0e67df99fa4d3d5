"""The folds of a method beside its exact one: checked, and made."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.clip import Normalizer
from adamerge.methods.base import FoldsInWays, MergeMethod, folds_of

log = logging.getLogger("adamerge")

IMAGES = 512  # per task, at most, that a fold looks at
TITLES = {"per_task": "folded per task", "single": "folded to one"}


class Images(Protocol):
    """What a fold asks of a run's images (see `learn.data.TaskData`)."""

    def some(self, word: str, count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]: ...


def check(fold: str | None, method: MergeMethod, name: str) -> None:
    """Raises AdamergeError unless the method has the fold; None, its exact one, all have."""
    if fold is None or fold in folds_of(method):
        return
    others = ", ".join(folds_of(method))
    raise AdamergeError(
        f"fold is {fold!r}, which method {name} with these settings does not have: expected null "
        f"(its exact fold){f' or {others}' if others else ''}"
    )


def title(method: MergeMethod, name: str, fold: str) -> str:
    """The row of a method so folded, `wemoe, folded per task`; of its own fold, the method's."""
    return name if fold == method.own_fold else f"{name}, {TITLES[fold]}"


@torch.no_grad()
def statistics(
    method: MergeMethod, data: Images, normalizer: Normalizer, device: torch.device, size: int
) -> Any:
    """What the method's folds must know of the unlabeled images that were adapted on.

    Args:
        device: where the images are encoded; the method is on the CPU again afterwards.
        size: images encoded at a time.
    """
    if not isinstance(method, FoldsInWays) or not method.folds:
        return None
    log.info("folding: mean gates over unlabeled images, at most %d of each task", IMAGES)
    method.to(device)
    normalizer.to(device)
    batches = data.some("fold", IMAGES, size)
    known = method.statistics((normalizer(images.to(device)), ids) for images, ids in batches)
    method.to("cpu")
    normalizer.to("cpu")
    return known


def encoder(method: MergeMethod, fold: str | None, known: Any) -> tuple[nn.Module, bool]:
    """The encoder of a fold, and whether it keeps every feature.

    Args:
        known: what `statistics` gave.
    """
    if fold is None or not isinstance(method, FoldsInWays):
        return method.fold(), True
    return method.fold_as(fold, known), method.folds[fold]
