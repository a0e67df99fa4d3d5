"""What transforms and methods get of unlabeled images by name: `images`, `inputs`, `gradients`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from adamerge.config.inputs import Suite, cache_root, normalizer
from adamerge.config.settings import Config
from adamerge.config.targets import Supplied
from adamerge.config.trainer import run_device
from adamerge.encoders.clip import Normalizer
from adamerge.encoders.experts import Experts
from adamerge.encoders.gradients import Gradients, Kind
from adamerge.encoders.statistics import Keep, gather_inputs, in_files
from adamerge.images.batches import stream_seed
from adamerge.learn.data import TaskData
from adamerge.learn.features import content_key

_AT_ONCE = 32  # images of a batch; the batches of published tables, which `batch_sum` depends on
_FORMAT = 1  # of what is kept; another number makes new files


def statistics(config: Config, suite: Suite, data: TaskData) -> Supplied:
    """The values of `targets.STATISTICS`, gathered when asked for, on the device of the run.

    `statistics.images` images of each task, of those that are adapted on, chosen by the seed. What
    is gathered is kept in `cache_dir` under all that it depends on.
    """
    device = run_device(config["trainer"])
    count = config["statistics"]["images"]
    images = Chosen(data, normalizer(suite.clip), device, count)

    def experts() -> Experts:
        return Experts(suite.clip.backbone, suite.task_vectors)

    def kept(kind: str, *parts: object) -> Keep:
        known = [_FORMAT, kind, *images.words(), suite.task_vectors.storage.dtype, device.type]
        known += [json.dumps(suite.clip.config["model_cfg"], sort_keys=True), *parts]
        weights = [suite.files[key]["sha256"] for key in ("pretrained", *suite.task_vectors.tasks)]
        keys = {
            task: content_key({}, *known, weights[0], own, task, data.tasks[task].key)
            for task, own in zip(suite.task_vectors.tasks, weights[1:], strict=True)
        }
        return in_files(cache_root(config) / "statistics", keys)

    def gradients() -> Gradients:
        heads = suite.heads
        key = content_key({task: heads.weight(task) for task in heads.tasks})
        return Gradients(experts(), heads, images, {k: kept(k, key) for k in get_args(Kind)})

    return {
        "images": lambda: images,
        "inputs": lambda: gather_inputs(experts(), images, kept("inputs")),
        "gradients": gradients,
    }


class Chosen(Mapping[str, "Batches"]):
    """Task -> batches of some of the images that it is adapted on, normalised, on a device.

    Args:
        count: of each task; all, where there are fewer.
    """

    def __init__(
        self, data: TaskData, normalizer: Normalizer, device: torch.device, count: int
    ) -> None:
        self._data, self._normalizer, self._device, self._count = data, normalizer, device, count

    def __getitem__(self, task: str) -> Batches:
        rows = self._data.adapt_rows[task]
        generator = np.random.default_rng(stream_seed("statistics", self._data.seed, task))
        chosen = np.sort(generator.permutation(rows)[: self._count])
        return Batches(self._data.tasks[task].images, chosen, self._normalizer, self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._data.tasks)

    def __len__(self) -> int:
        return len(self._data.tasks)

    def words(self) -> list[object]:
        """What decides the batches, beside the tasks' images."""
        scale = [
            *self._normalizer.mean.flatten().tolist(),
            *self._normalizer.std.flatten().tolist(),
        ]
        return [self._count, self._data.seed, self._data.protocol, scale]


class Batches:
    """Batches `[B, 3, H, W]` of rows of stored images, as often as they are gone through."""

    def __init__(
        self, images: np.ndarray, rows: np.ndarray, normalizer: Normalizer, device: torch.device
    ) -> None:
        self._images, self._rows, self._normalizer, self._device = images, rows, normalizer, device

    def __iter__(self) -> Iterator[Tensor]:
        scale = self._normalizer.to(self._device)
        for start in range(0, len(self._rows), _AT_ONCE):
            picked = self._images[self._rows[start : start + _AT_ONCE]]
            yield scale(torch.from_numpy(np.asarray(picked)).to(self._device))
