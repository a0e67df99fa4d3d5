"""What `trainer:` says: a device, processes, and Lightning's Trainer."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, callbacks
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from adamerge._base.binding import problems
from adamerge._base.errors import AdamergeError
from adamerge.config.settings import Config
from adamerge.config.targets import Kind, build, target_problems

_STEPS = "batches have no end: set trainer.max_steps"
_REFUSED = {  # arguments of the Trainer -> why they are not set here, and what is set instead
    "logger": "metrics.csv and Weights & Biases are the loggers: set wandb",
    "log_every_n_steps": "set log_every",
    "default_root_dir": "set run_dir",
    "enable_checkpointing": "a run that stops must be one to go on with: set checkpoint_every",
    "accumulate_grad_batches": "a step is one merge for all of its images: set batch_size, and "
    "micro_batch to save memory",
    "max_epochs": _STEPS,
    "min_epochs": _STEPS,
    "limit_train_batches": _STEPS,
    "overfit_batches": _STEPS,
    "fast_dev_run": "it would leave nothing: set trainer.max_steps=1",
    "barebones": "it would leave nothing to read or to go on with",
    "val_check_interval": "set eval_every",
    "use_distributed_sampler": "every process draws its own images already",
    "sync_batchnorm": "the statistics of the tower are merged, not learned",
}
_BREAKING = {  # callbacks of Lightning -> why not
    callbacks.Checkpoint: "checkpoints are written every checkpoint_every steps",
    callbacks.GradientAccumulationScheduler: _REFUSED["accumulate_grad_batches"],
    callbacks.BaseFinetuning: "nothing but the method's own parameters is trained",
    callbacks.ModelPruning: "the method's own parameters are what is learned",
    callbacks.WeightAveraging: "the exported merge is that of the last step",
    callbacks.StochasticWeightAveraging: "the exported merge is that of the last step",
    callbacks.BatchSizeFinder: "set batch_size, or micro_batch to save memory",
    callbacks.LearningRateFinder: "set optim.lr",
    callbacks.ThroughputMonitor: "images_per_second is logged already",
}
_LISTS = ("callbacks", "plugins")
_PARTS = (Callback, Strategy, Accelerator, Profiler, Precision, LayerSync, ClusterEnvironment)


def _is_part(found: Any) -> bool:
    if not inspect.isclass(found) or not issubclass(found, _PARTS) or found in _PARTS:
        return False
    for breaking, why in _BREAKING.items():
        if issubclass(found, breaking):
            raise AdamergeError(f"trainer.callbacks: {found.__name__} is not for adamerge: {why}")
    return True


_PART = Kind(_is_part, "a callback or another part of lightning's Trainer", (), "lightning.")


def trainer_problems(trainer: Config) -> list[str]:
    """What is wrong with arguments of the Trainer, and with each `_target_` in them."""
    refused = [key for key in trainer if key in _REFUSED]
    found = [f"trainer.{key} is not for adamerge: {_REFUSED[key]}" for key in refused]
    given = {key: value for key, value in trainer.items() if key not in _REFUSED}
    parts = [(k, v) for k, v in given.items() if isinstance(v, dict) and "_target_" in v]
    for key in _LISTS:
        parts += [(f"{key}.{i}", part) for i, part in enumerate(_listed(given.pop(key, None)))]
    found += problems(Trainer, given, "trainer", _REFUSED)
    clip = given.get("gradient_clip_val")
    if isinstance(clip, int | float) and not 0 <= clip < math.inf:  # Lightning would not clip
        found.append(f"trainer.gradient_clip_val is {clip!r}: expected a number >= 0, or null")
    for key, part in parts:
        found += target_problems(f"trainer.{key}", part, _PART)
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def build_trainer(trainer: Config, **more: Any) -> Trainer:
    """Lightning's Trainer as the settings say.

    Args:
        more: arguments that a run needs, `callbacks` and `plugins` among them.

    Raises:
        AdamergeError: what Lightning refuses.
    """
    with one_sentence(ValueError, TypeError):
        given = build("trainer", trainer, _PART, {})
        for key in _LISTS:
            more[key] = [*more[key], *_listed(given.get(key))]
        return Trainer(
            **{"enable_progress_bar": False, "enable_model_summary": False, **given, **more},
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )


@contextlib.contextmanager
def one_sentence(*more: type[Exception]) -> Iterator[None]:
    """Makes one sentence of what Lightning refuses, and of exceptions of `more` types."""
    refusals: tuple[type[BaseException], ...] = (MisconfigurationException, ImportError, *more)
    try:
        yield
    except refusals as error:
        raise AdamergeError(f"trainer: {' '.join(str(error).split())}") from error


def may_touch_gpu(trainer: Config) -> bool:
    """Whether this process may touch a GPU: not where it computes elsewhere, or is forked later."""
    forks = any(word in str(trainer.get("strategy")) for word in ("fork", "notebook"))
    return trainer["accelerator"] in ("auto", "gpu", "cuda") and not forks


def run_device(trainer: Config) -> torch.device:
    """Where the main process of a run computes, by its `trainer` settings."""
    # A process that has touched a GPU cannot be forked.
    if not may_touch_gpu(trainer) or not torch.cuda.is_available():
        return torch.device("cpu")
    devices = trainer.get("devices")
    if isinstance(devices, str) and "," in devices:  # as the Trainer reads it: their numbers
        devices = [int(part) for part in devices.split(",") if part.strip().isdigit()]
    first = devices[0] if isinstance(devices, list) and devices else 0
    return torch.device("cuda", first if isinstance(first, int) and first >= 0 else 0)


def ranks(trainer: Config) -> int | None:
    """Processes of a run, as far as its settings tell: `auto`, -1 and texts are the Trainer's."""
    devices, nodes = trainer["devices"], trainer.get("num_nodes", 1)
    count = len(devices) if isinstance(devices, list) else devices
    known = isinstance(count, int) and count > 0 and isinstance(nodes, int)
    return count * nodes if known else None


def check_place(settings: Config) -> None:
    """Refuses task vectors on a GPU where a run computes elsewhere."""
    asked, device = settings["task_vectors"]["device"], run_device(settings["trainer"])
    if asked == "cuda" and device.type != "cuda":
        raise AdamergeError(
            "task_vectors.device is cuda, but this run computes on the CPU: leave it at auto, or "
            "set host or disk; or use a machine with a GPU (trainer.accelerator=gpu)"
        )
