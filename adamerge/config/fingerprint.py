"""The fingerprint of a run: what its result depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adamerge.config.build import _TRAINER
from adamerge.config.inputs import Suite
from adamerge.config.settings import Config
from adamerge.learn.data import TaskData

_DECISIVE = (
    *("suite", "method", "objective", "transform", "protocol", "seed"),
    *("batch_size", "micro_batch", "optim", "scheduler", "store", "online"),
)


def fingerprint(config: Config, suite: Suite, data: TaskData) -> dict[str, str]:
    """What a run's result depends on, as flat `key: value` texts: settings, files, images."""
    flat: dict[str, str] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for inner, item in value.items():
                add(f"{key}.{inner}", item)
        else:
            flat[key] = str(value)

    for key in _DECISIVE:
        add(key, config[key])
    for key in _TRAINER:
        if key not in ("max_steps", "max_time", "accelerator", "strategy"):
            add(f"trainer.{key}", config["trainer"].get(key))
    if config["update"]["name"] != "joint":  # runs of earlier versions know no other
        add("update", config["update"])
    if config["heads"] != "frozen":
        add("heads", config["heads"])
    if config["task_vectors"]["dtype"] != "float32":
        flat["task_vectors.dtype"] = config["task_vectors"]["dtype"]
    flat["order of tasks"] = ", ".join(config["suite"]["tasks"])
    for name, file in suite.files.items():
        flat[f"sha256 of {name}"] = file["sha256"]
    for task, images in data.tasks.items():
        flat[f"images of {task}"] = images.key
    # Where a file lies does not matter; its content does, and is in the list.
    places = (
        ".expert",
        ".head",
        ".data.path",
        "suite.pretrained",
        "suite.architecture",
        "suite.root",
        "method.base",
    )
    aside = ("suite.unseen", "suite.vars.")  # only scored; already in what they stand in
    for key in [key for key in flat if key.endswith(places) or key.startswith(aside)]:
        del flat[key]
    flat["model config"] = json.dumps(suite.clip.config, sort_keys=True)
    return flat
