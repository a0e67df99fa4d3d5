"""Accuracy per task: where labels are read (beside `objectives.Labels`, which learns from them)."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from adamerge.encoders.clip import Normalizer
from adamerge.encoders.heads import Heads
from adamerge.encoders.tower import Tower, merged_encoder, static_encoder
from adamerge.export import folds
from adamerge.learn.data import TaskData
from adamerge.learn.features import content_key
from adamerge.methods.base import FoldsInWays, MergeMethod
from adamerge.weights.task_vectors import TaskVectors

log = logging.getLogger("adamerge")

_SCORING = 1  # how it is scored; another number forgets what was scored before
ORACLE_GRID = tuple(round(0.1 * step, 1) for step in range(11))
TITLES = {
    "pretrained": "pretrained",
    "expert": "experts, each on its own task",
    "weight_average": "weight average",
    "task_arithmetic": "task arithmetic, λ = 0.3",
    "task_arithmetic_best": "task arithmetic, best λ (oracle: chosen by labels)",
}


@dataclass
class Row:
    """One line of the results.

    Attributes:
        name: what was scored.
        accuracy: fraction right per labelled task, on the images that count.
        adapted: the same on the images adapted on, where these are others (`heldout`).
        unseen: the same per unseen task, where a suite has any; an expert has none.
        notes: anything more, such as the oracle's coefficient.
    """

    name: str
    accuracy: dict[str, float]
    adapted: dict[str, float] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    unseen: dict[str, float] | None = None


@dataclass
class Scorer:
    """Measures encoders on the scored images of every labelled task.

    Attributes:
        device: where encoders run; they are moved there and back to the CPU.
        merged: whether the tasks are those that were merged. An encoder is told of an image of
            another task by −1 as its task.
        unseen: a second one, for the tasks that are only scored.
    """

    heads: Heads
    normalizer: Normalizer
    data: TaskData
    device: torch.device
    batch_size: int = 256
    merged: bool = True
    unseen: Scorer | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks that have labels."""
        return [task for task, images in self.data.tasks.items() if images.labels is not None]

    @property
    def measures(self) -> bool:
        """Whether any task, unseen ones included, has labels."""
        return bool(self.tasks) or (self.unseen is not None and self.unseen.measures)

    def key(self) -> str:
        """Of all that decides an encoder's accuracies beside the encoder itself."""
        parts: list[object] = [_SCORING, *machine(self.device), self.batch_size]
        parts += [self.merged, self.data.protocol, *self.heads.tasks]
        for images in self.data.tasks.values():
            labels = images.labels
            parts += [images.key, labels if labels is None else labels.tolist()]
        parts += [self.unseen.key()] if self.unseen is not None else []
        tensors = dict(self.heads.named_buffers()) | dict(self.normalizer.named_buffers())
        return content_key(tensors, *parts)

    @torch.no_grad()
    def accuracy(
        self, encoder: nn.Module, tasks: Sequence[str] | None = None, part: str = "score"
    ) -> dict[str, float]:
        """Fraction of images classified right, per task (`torchmetrics`, micro average)."""
        encoder.to(self.device)
        heads, normalizer = self.heads.to(self.device), self.normalizer.to(self.device)
        accuracy = {}
        for index, task in enumerate(self.heads.tasks):
            if task not in (self.tasks if tasks is None else tasks):
                continue
            classes = max(len(self.heads.classes[task]), 2)
            metric = MulticlassAccuracy(classes, average="micro", sync_on_compute=False)
            metric.to(self.device)
            for images, labels in self.data.labelled(task, part, self.batch_size):
                ids = torch.full((len(images),), index if self.merged else -1)
                logits = heads.logits(encoder(normalizer(images.to(self.device)), ids), task)
                metric.update(logits.argmax(-1), labels.to(self.device))
            accuracy[task] = float(metric.compute())
        return accuracy

    def row(self, name: str, encoder: nn.Module, tasks: Sequence[str] | None = None) -> Row:
        """Scores an encoder; under `heldout` also on the half it was adapted on.

        Without `tasks` it is also scored on the unseen ones, unless it encodes images of its own
        `tasks` alone.
        """
        row = Row(name, self.accuracy(encoder, tasks))
        if self.unseen is not None:
            able = tasks is None and not hasattr(encoder, "tasks")
            row.unseen = self.unseen.accuracy(encoder) if able else {}
        if self.data.protocol == "heldout":
            row.adapted = self.accuracy(encoder, tasks, part="adapt")
        encoder.to("cpu")
        return row


def baseline_rows(
    scorer: Scorer,
    tower: Tower,
    task_vectors: TaskVectors,
    oracle: bool = True,
    kept: Callable[[str, Callable[[], Any]], Any] = lambda _, make: make(),
) -> list[Row]:
    """Rows for the pretrained model, the experts, weight averaging and task arithmetic.

    Args:
        task_vectors: untransformed.
        oracle: add task arithmetic at the best of λ = 0, 0.1 … 1, chosen by the labels.
        kept: gives what it keeps under a name, or else makes it; see `kept.Kept`.
    """

    def row(name: str, key: Any, said: str, encoder: Callable[[], nn.Module], *tasks: str) -> Row:
        def score() -> dict[str, Any]:
            log.info("scoring: %s", said)
            return dataclasses.asdict(scorer.row(name, encoder(), tasks or None))

        return Row(**{**kept(json.dumps(key), score), "name": name})

    def merged(name: str, λ: float) -> Row:
        encoder = functools.partial(merged_encoder, tower, task_vectors, λ)
        return row(name, λ, f"{name.replace('_', ' ')} ({λ:.2g})", encoder)

    def given(name: str, task: str | None = None) -> Row:
        encoder = functools.partial(static_encoder, tower, task_vectors, task)
        tasks = [] if task is None else [task]
        return row(name, [name, task], " ".join([name, *tasks]), encoder, *tasks)

    pretrained = given("pretrained")
    experts = Row("expert", {}, None if pretrained.adapted is None else {})
    experts.unseen = None if scorer.unseen is None else {}
    for alone in [given("expert", task) for task in task_vectors.tasks if task in scorer.tasks]:
        experts.accuracy |= alone.accuracy
        if experts.adapted is not None:
            experts.adapted |= alone.adapted or {}
    rows = [
        pretrained,
        experts,
        merged("weight_average", 1 / len(task_vectors.tasks)),
        merged("task_arithmetic", 0.3),
    ]
    if oracle and experts.accuracy:
        known = {0.0: rows[0], 0.3: rows[3]}
        grid = {λ: known.get(λ) or merged("task_arithmetic_best", λ) for λ in ORACLE_GRID}
        best = max(grid, key=lambda λ: average(grid[λ].accuracy) or 0.0)
        notes = {"coefficient": best, "oracle": True}
        rows.append(dataclasses.replace(grid[best], name="task_arithmetic_best", notes=notes))
    return rows


def fold_rows(method: MergeMethod, name: str, known: Any, scorer: Scorer) -> list[Row]:
    """A row for every fold that is not the method's own exact one.

    Args:
        known: what `folds.statistics` gave.
    """
    rows: list[Row] = []
    if not isinstance(method, FoldsInWays):
        return rows
    for fold in [fold for fold in method.folds if fold != method.own_fold]:
        title = folds.title(method, name, fold)
        log.info("scoring: %s", title)
        row = scorer.row(title, method.fold_as(fold, known))
        row.notes["fold"] = fold
        rows.append(row)
    return rows


def machine(device: torch.device) -> tuple[str, str, str]:
    """What decides how an encoder's features are rounded, as far as it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return torch.__version__, name, torch.get_float32_matmul_precision()


def average(accuracy: Mapping[str, float]) -> float | None:
    """Mean over tasks; None where no task has labels."""
    return sum(accuracy.values()) / len(accuracy) if accuracy else None


def normalized(accuracy: Mapping[str, float], experts: Mapping[str, float]) -> float | None:
    """Mean over tasks of accuracy ÷ the expert's own accuracy; None where that is undefined."""
    ratios = [accuracy[task] / experts[task] for task in accuracy if experts.get(task)]
    return sum(ratios) / len(ratios) if accuracy and len(ratios) == len(accuracy) else None
