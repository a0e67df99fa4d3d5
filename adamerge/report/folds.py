"""The folds of a method beside its exact one: checked, made, and scored."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.clip import Normalizer
from adamerge.export.card import IMAGES
from adamerge.images.batches import stream_seed
from adamerge.learn.data import TaskData
from adamerge.methods.base import MergeMethod
from adamerge.report.evaluation import Row, Scorer

log = logging.getLogger("adamerge")

_TITLES = {"per_task": "folded per task", "single": "folded to one"}


def check(fold: str | None, method: MergeMethod, name: str) -> None:
    """Raises AdamergeError unless the method has the fold; None, its exact one, all have."""
    if fold is None or fold in method.folds:
        return
    others = ", ".join(method.folds)
    raise AdamergeError(
        f"fold is {fold!r}, which method {name} with these settings does not have: expected null "
        f"(its exact fold){f' or {others}' if others else ''}"
    )


def title(method: MergeMethod, name: str, fold: str) -> str:
    """The row of a method so folded, `wemoe, folded per task`; of its own fold, the method's."""
    return name if fold == method.own_fold else f"{name}, {_TITLES[fold]}"


@torch.no_grad()
def statistics(
    method: MergeMethod, data: TaskData, normalizer: Normalizer, device: torch.device, size: int
) -> Any:
    """What the method's folds must know of the unlabeled images that were adapted on.

    Args:
        device: where the images are encoded; the method is on the CPU again afterwards.
        size: images encoded at a time.
    """
    if not method.folds:
        return None
    method.to(device)
    found = method.statistics(_batches(data, normalizer.to(device), device, size))
    method.to("cpu")
    normalizer.to("cpu")
    return found


def rows(method: MergeMethod, name: str, found: Any, scorer: Scorer) -> list[Row]:
    """A row for every fold that is not the method's own exact one."""
    scored = []
    for fold in method.folds if scorer.measures else ():
        if fold == method.own_fold:
            continue
        log.info("scoring: %s", title(method, name, fold))
        row = scorer.row(title(method, name, fold), method.fold_as(fold, found))
        row.notes["fold"] = fold
        scored.append(row)
    return scored


def encoder(method: MergeMethod, fold: str | None, found: Any) -> tuple[nn.Module, bool]:
    """The encoder of a fold, and whether it keeps every feature."""
    if fold is None:
        return method.fold(), True
    return method.fold_as(fold, found), method.folds[fold]


def _batches(
    data: TaskData, normalizer: Normalizer, device: torch.device, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and task ids; which images depends on the seed and the task's name."""
    counts = {task: min(IMAGES, len(rows)) for task, rows in data.adapt_rows.items()}
    log.info("folding: mean gates over %d unlabeled images, at most %d of each task",
             sum(counts.values()), IMAGES)  # fmt: skip
    for index, (task, everything) in enumerate(data.adapt_rows.items()):
        generator = np.random.default_rng(stream_seed("fold", data.seed, task))
        chosen = np.sort(generator.permutation(everything)[: counts[task]])
        for start in range(0, len(chosen), size):
            images = torch.from_numpy(data.tasks[task].images[chosen[start : start + size]])
            yield normalizer(images.to(device)), torch.full((len(images),), index)
