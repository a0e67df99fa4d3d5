"""What frozen encoders say of a run's images, computed once: targets of a teacher, features."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.encoders.experts import Experts
from adamerge.images.batches import Stream
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.data import TaskData
from adamerge.learn.features import StoredBatches, content_key, online_steps, stored_features
from adamerge.learn.objectives import Taught
from adamerge.methods.base import OnFrozenFeatures

log = logging.getLogger("adamerge")

Encode = Callable[
    [Tensor, Tensor], Tensor
]  # normalised images [B, 3, H, W], task ids [B] -> [B, F]


@dataclass
class Stores:
    """Computes what a run's steps would otherwise compute again and again, and keeps it.

    Args:
        module: gives method, objective and normalizer; moved to `device`.
        data: the run's images.
        files: records of the suite's files, for keys.
        architecture: of the tower, in words: the same weights compute other features in another.
        folder: for the stored arrays.
        steps: that the run takes; negative: unknown, so that all images are taken.
        ranks: processes of the run; None: unknown, so that all images are taken.
    """

    module: Adaptation
    data: TaskData
    files: Mapping[str, Mapping[str, str]]
    architecture: str
    folder: Path
    device: torch.device
    steps: int
    ranks: int | None = 1

    def targets(self) -> dict[str, np.ndarray]:
        """The teacher's features of every task's images; none where no teacher is stored."""
        if not stores_targets(self.module):
            return {}
        known = [self.files["pretrained"]["sha256"], "expert"]
        objective = self.module.objective
        assert isinstance(objective, Taught) and isinstance(objective.teacher, Experts)
        dtype = objective.teacher.task_vectors.storage.dtype
        known += [] if dtype == "float32" else [dtype]  # other experts, if only a little
        found = {}
        for task in self.data.tasks:
            key = content_key({}, *known, self.files[task]["sha256"], *self._of_images(task))
            found[task] = self._stored(task, key, self.module.objective.targets, "expert")
        return found

    def features(self) -> dict[str, np.ndarray] | None:
        """The frozen encoder's features of every task's images; None without such an encoder."""
        method = self.module.method
        if not isinstance(method, OnFrozenFeatures) or not stores_features(self.module):
            return None
        weights = content_key(method.frozen_state())
        found = {}
        for task in self.data.tasks:
            key = content_key({}, weights, task, *self._of_images(task))
            found[task] = self._stored(task, key, method.frozen_features, "merged encoder")
        return found

    def _of_images(self, task: str) -> list[object]:
        """What decides the images of a task, the order in which they are drawn, and, beside an
        encoder's weights, what it makes of them."""
        normalizer, data = self.module.normalizer, self.data
        shift = [*normalizer.mean.flatten().tolist(), *normalizer.std.flatten().tolist()]
        drawn = [data.tasks[task].key, shift, data.protocol, data.seed, task]
        return [*drawn, self.architecture, self.device.type]

    def _stored(
        self, task: str, key: str, run: Callable[[Tensor, Tensor], Tensor | None], name: str
    ) -> np.ndarray:
        index = self.module.heads.tasks.index(task)
        order = self._order(task)

        def encode(images: Tensor) -> Tensor:
            ids = torch.full((len(images),), index)
            found = run(self.module.normalizer(images), ids)
            assert found is not None  # it was asked before
            return found

        self.module.to(self.device)
        images = self.data.tasks[task].images

        def say(count: int) -> None:
            log.info("task %s: %d images encoded once by its %s", task, count, name)

        return stored_features(
            encode, images, self.folder, key, device=self.device, order=order, say=say
        )

    def _order(self, task: str) -> np.ndarray:
        data = self.data
        steps = -1 if self.ranks is None else self.steps
        size = data.batch_size * (self.ranks or 1)
        return Stream(task, data.adapt_rows[task], data.seed, size).needed(steps)


def stores_targets(module: Adaptation) -> bool:
    """Whether the objective compares with an expert's features, which no step changes."""
    objective = module.objective
    return (
        isinstance(objective, Taught)
        and not objective.traces
        and isinstance(objective.teacher, Experts)
    )


def stores_features(module: Adaptation) -> bool:
    """Whether the method learns on features that no step changes."""
    method = module.method
    on_features = isinstance(method, OnFrozenFeatures) and bool(method.frozen_state())
    return on_features and not module.objective.traces


def prepare(stores: Stores, keep: bool, online: bool) -> None:
    """Has the run's batches read what is stored in place of images.

    Args:
        keep: store at all.
        online: every image comes once; a task ends with its images.

    Raises:
        AdamergeError: `online` with several processes.
    """
    if online and stores.ranks != 1:
        raise AdamergeError(
            "online: true lets a task end before others, which DDP cannot: set trainer.devices=1"
        )
    targets = stores.targets() if keep else {}
    features = stores.features() if keep else None
    image_ids = stores.module.objective.sees_image_ids
    if targets or features is not None or online or image_ids:
        stores.data.wrap = functools.partial(
            StoredBatches, targets=targets, features=features, online=online, image_ids=image_ids
        )


def steps_online(data: TaskData) -> int:
    """The steps it takes to see every image once."""
    return online_steps(data.batches().streams)
