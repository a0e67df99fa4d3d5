"""What a run is made of: settings, inputs, and the module that learns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adamerge.config import build, inputs
from adamerge.config.inputs import Inputs
from adamerge.config.settings import Config
from adamerge.encoders.heads import Heads
from adamerge.export import folds
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.classifiers import LearnedHeads
from adamerge.learn.resume import CHECKPOINT, check_fingerprint, read_checkpoint
from adamerge.report.evaluation import Scorer
from adamerge.report.keep import KEPT

# What the result of a run depends on, besides files and images.
_DECISIVE = (
    *("suite", "method", "objective", "transform", "protocol", "seed"),
    *("batch_size", "micro_batch", "optim", "scheduler", "store", "online"),
)
_OF_TRAINER = (
    *("devices", "num_nodes", "precision", "gradient_clip_val", "gradient_clip_algorithm"),
    *("deterministic", "benchmark", "plugins"),
)
# Where a file lies does not matter; its content does. Unseen tasks are only scored, and variables
# are in what they stand in.
_PLACES = (
    *(".expert", ".head", ".data.path", "suite.pretrained", "suite.architecture", "suite.root"),
    "method.base",
)
_ASIDE = ("suite.unseen", "suite.vars.")


@dataclass
class Job(Inputs):
    """One run's objects: settings, inputs, and the module that learns from the merged tasks."""

    module: Adaptation

    def heads(self) -> Heads:
        """The heads of the merge: the suite's, or what was learned from them."""
        heads = self.module.heads
        return heads.frozen() if isinstance(heads, LearnedHeads) else self.suite.heads

    def own_scorer(self, device: torch.device | None = None) -> Scorer:
        """Measures the merge, by its own heads."""
        return replace(self.scorer(device), heads=self.heads())

    def fingerprint(self) -> dict[str, str]:
        """What the run's result depends on, as `key: value` texts: settings, files, images."""
        config, flat = self.settings, {}

        def add(key: str, value: Any) -> None:
            if isinstance(value, Mapping):
                for inner, item in value.items():
                    add(f"{key}.{inner}", item)
            elif not key.endswith(_PLACES) and not key.startswith(_ASIDE):
                flat[key] = str(value)

        for key in _DECISIVE:
            add(key, config[key])
        for key in _OF_TRAINER:
            add(f"trainer.{key}", config["trainer"].get(key))
        if config["task_vectors"]["dtype"] != "float32":
            add("task_vectors.dtype", config["task_vectors"]["dtype"])
        if config["update"]["name"] != "joint":  # runs of earlier versions know no other
            add("update", config["update"])
        if config["heads"] != "frozen":
            add("heads", config["heads"])
        if build.asks_statistics(config):
            add("statistics", config["statistics"])
        add("order of tasks", ", ".join(config["suite"]["tasks"]))
        for name, file in self.suite.files.items():
            add(f"sha256 of {name}", file["sha256"])
        for task, images in self.data.tasks.items():
            add(f"images of {task}", images.key)
        add("model config", json.dumps(self.suite.clip.config, sort_keys=True))
        return flat

    def resume(self, run_dir: Path) -> tuple[int, dict[str, Any]]:
        """Takes what a run has learned out of its last checkpoint; returns its step, and what it
        has measured and kept (see `keep.Keep`).

        Raises:
            AdamergeError: there is none, it is damaged, or it is of other settings or inputs.
        """
        saved = read_checkpoint(run_dir / CHECKPOINT)
        check_fingerprint(saved, self.fingerprint(), run_dir)
        self.module.load_state_dict(saved["state_dict"])
        return int(saved["global_step"]), saved.get(KEPT, {})


def load_job(settings: Config) -> Job:
    """Loads everything that a checked configuration names."""
    known = inputs.load(settings)
    method = build.build_method(settings, known.suite, known.data)
    folds.check(settings["fold"], method, settings["method"]["name"])
    module = build.build_adaptation(settings, known.suite, method)
    return Job(settings, known.suite, known.data, known.unseen, module)
