"""What frozen encoders say of a run's images, computed once: targets of a teacher, features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
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
from adamerge.learn.features import StoredBatches, content_key, stored_features
from adamerge.learn.objectives import Taught
from adamerge.methods.base import OnFrozenFeatures

# normalised images [B, 3, H, W], task ids [B] -> [B, F]
Encode = Callable[[Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Store:
    """Where a run keeps what its steps would otherwise compute again and again.

    Attributes:
        module: gives method, objective and normalizer; moved to `device` where it has to compute.
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

    def outputs(
        self, encode: Encode, encoder: str, keys: Mapping[str, Sequence[object]]
    ) -> dict[str, np.ndarray]:
        """What an encoder gives for the images of every task that are drawn, `[N, F]`.

        Args:
            encoder: its name for the log.
            keys: task -> what decides the encoder.
        """
        module, data = self.module.to(self.device), self.data
        mean, std = module.normalizer.mean, module.normalizer.std
        shift = [*mean.flatten().tolist(), *std.flatten().tolist()]
        size, steps = data.batch_size * (self.ranks or 1), -1 if self.ranks is None else self.steps
        outputs = {}
        for task, key in keys.items():
            drawn = [data.tasks[task].key, shift, data.protocol, data.seed, task]
            outputs[task] = stored_features(
                functools.partial(_run, encode, module, task),
                data.tasks[task].images,
                self.folder,
                content_key({}, *key, *drawn, self.architecture, self.device.type),
                device=self.device,
                order=Stream(task, data.adapt_rows[task], data.seed, size).needed(steps),
                what=f"images of task {task} by its {encoder}",
            )
        return outputs


def _run(encode: Encode, module: Adaptation, task: str, images: Tensor) -> Tensor:
    task_ids = torch.full((len(images),), module.heads.tasks.index(task))
    outputs = encode(module.normalizer(images), task_ids)
    assert outputs is not None  # `prepare` asks encoders that have some
    return outputs


def taught_by_experts(module: Adaptation) -> Experts | None:
    """The experts whose features the objective compares with, which no step changes; or None."""
    objective = module.objective
    if isinstance(objective, Taught) and not objective.traces:
        return objective.teacher if isinstance(objective.teacher, Experts) else None
    return None


def learns_on_features(module: Adaptation) -> bool:
    """Whether the method learns on features that no step changes."""
    method = module.method
    on_features = isinstance(method, OnFrozenFeatures) and bool(method.frozen_state())
    return on_features and not module.objective.traces


def prepare(store: Store, keep: bool, online: bool) -> None:
    """Has the run's batches read what is stored in place of images.

    Args:
        keep: store at all.
        online: every image comes once; a task ends with its images.

    Raises:
        AdamergeError: `online` with several processes; a task without labels that are asked for.
    """
    if online and store.ranks != 1:
        raise AdamergeError(
            "online: true lets a task end before others, which DDP cannot: set trainer.devices=1"
        )
    module, data, files = store.module, store.data, store.files
    targets: dict[str, np.ndarray] = {}
    features: dict[str, np.ndarray] | None = None
    if keep and (experts := taught_by_experts(module)) is not None:
        dtype = experts.task_vectors.storage.dtype
        known = [files["pretrained"]["sha256"], "expert"]
        known += [] if dtype == "float32" else [dtype]  # other experts, if only a little
        keys = {task: [*known, files[task]["sha256"]] for task in data.tasks}
        targets = store.outputs(module.objective.targets, "expert", keys)
    if keep and learns_on_features(module) and isinstance(module.method, OnFrozenFeatures):
        weights = content_key(module.method.frozen_state())
        keys = {task: [weights, task] for task in data.tasks}
        features = store.outputs(module.method.frozen_features, "merged encoder", keys)
    if module.objective.sees_labels:
        targets = {task: _labels(task, images.labels) for task, images in data.tasks.items()}
    image_ids = module.objective.sees_image_ids
    if targets or features is not None or online or image_ids:
        data.wrap = functools.partial(
            StoredBatches, targets=targets, features=features, online=online, image_ids=image_ids
        )


def _labels(task: str, labels: np.ndarray | None) -> np.ndarray:
    if labels is None:
        raise AdamergeError(
            f"task {task!r} has no labels, which the objective learns from: name their column in "
            "its data, or use a label-free objective such as objective=expert_kl"
        )
    return labels
