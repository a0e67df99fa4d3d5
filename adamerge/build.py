"""From a checked configuration to the objects of a run."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from adamerge.adaptation import Adaptation
from adamerge.binding import call, find, function_to, nearest, problems, subclass_of
from adamerge.checkpoints import load_pretrained, read, resolve, sha256, tower_state
from adamerge.config import Config
from adamerge.config import problems as problems_of_config
from adamerge.data import TaskData
from adamerge.encoders import Clip, Experts, Normalizer, Tower, build_clip, merged_encoder
from adamerge.errors import AdamergeError
from adamerge.heads import Heads, Prompts, zero_shot_heads
from adamerge.image_cache import cache_images
from adamerge.methods.base import MergeMethod
from adamerge.objectives import Objective
from adamerge.sources import data_problems, open_dataset
from adamerge.task_vectors import TaskVectors

# Arguments of Lightning's Trainer that make sense here: others would be set twice, cut the endless
# stream of batches into epochs, or count steps in another way.
_TRAINER = (
    *("max_steps", "max_time", "accelerator", "devices", "num_nodes", "strategy", "precision"),
    *("gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark", "plugins"),
)
Supplied = Mapping[str, Callable[[], Any]]
SUPPLIED = ("backbone", "task_vectors", "heads", "teacher", "encoder", "tasks", "dim")
_KINDS: dict[str, tuple[Callable[[Any], bool], str, tuple[str, ...]]] = {
    "method": (subclass_of(MergeMethod), "a MergeMethod class", SUPPLIED),
    "objective": (subclass_of(Objective), "an Objective class", SUPPLIED),
    "optim": (subclass_of(torch.optim.Optimizer), "a torch optimizer class", ("params",)),
    "scheduler": (
        subclass_of(torch.optim.lr_scheduler.LRScheduler),
        "a torch learning-rate scheduler class",
        ("optimizer",),
    ),
    "transform": (
        function_to(TaskVectors),
        "a function from TaskVectors annotated to return TaskVectors",
        ("task_vectors",),
    ),
}


@dataclass
class Suite:
    """What is merged, loaded.

    Attributes:
        task_vectors: untransformed.
        files: sha256 of every weight file, by where it is used (`pretrained`, task names).
    """

    clip: Clip
    task_vectors: TaskVectors
    heads: Heads
    files: dict[str, dict[str, str]]


def check(config: Config) -> None:
    """Checks all of a configuration before anything is loaded.

    Raises:
        AdamergeError: all problems in one message: unknown keys, mistyped values, dotted paths
            that lead nowhere or do not fit their arguments.
    """
    found = problems_of_config(config)
    if isinstance(config["trainer"], Mapping):
        found += [
            f"trainer.{key} is unknown or not for adamerge{nearest(key, _TRAINER)}"
            for key in config["trainer"]
            if key not in _TRAINER
        ]
    for task, entry in _tasks(config).items():
        if isinstance(entry, Mapping) and entry.get("data") is not None:
            found += data_problems(f"suite.tasks.{task}.data", entry["data"])
    for key, part in _targets(config):
        try:
            target, arguments = _target(key, part)
        except AdamergeError as error:
            found.append(str(error))
            continue
        found += problems(target, arguments, key, _KINDS[key.partition("[")[0]][2])
    found = found or _trial(config)
    if found:
        raise AdamergeError("; ".join(found))


def _tasks(config: Config) -> Mapping[str, Any]:
    tasks = config["suite"].get("tasks")
    return tasks if isinstance(tasks, Mapping) else {}


def _trial(config: Config) -> list[str]:
    """Optimizer and scheduler judge their own values, on a parameter that is thrown away."""
    key = "optim"
    try:
        kind, arguments = _target(key, config[key])
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **arguments)
        if config["scheduler"] is not None:
            key = "scheduler"
            kind, arguments = _target(key, config[key])
            scheduler = kind(optimizer, **arguments)
            optimizer.step()
            scheduler.step()
    except AdamergeError as error:
        return [str(error)]
    except Exception as error:  # whatever an optimizer says of its arguments
        return [f"{key}: {' '.join(str(error).split())}"]
    return []


def _targets(config: Config) -> list[tuple[str, Any]]:
    parts = [(key, config[key]) for key in ("method", "objective", "optim")]
    parts += [("scheduler", config["scheduler"])] if config["scheduler"] is not None else []
    transforms = config["transform"] if isinstance(config["transform"], list) else []
    return parts + [(f"transform[{i}]", part) for i, part in enumerate(transforms)]


def _target(key: str, part: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    kind, expected, _ = _KINDS[key.partition("[")[0]]
    if not isinstance(part, Mapping) or "_target_" not in part:
        raise AdamergeError(f"{key} has no _target_: expected the dotted path of {expected}")
    arguments = {name: value for name, value in part.items() if name not in ("_target_", "name")}
    return find(str(part["_target_"]), key, kind, expected), arguments


def cache_root(config: Config) -> Path:
    """Where preprocessed images and heads are kept."""
    if config["cache_dir"]:
        return Path(config["cache_dir"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "adamerge"


def load_clip(suite: Config) -> tuple[Clip, dict[str, dict[str, str]]]:
    """The pretrained CLIP of a suite and the hash of its file."""
    source = str(suite["pretrained"])
    if suite["architecture"] in open_clip.list_models() and not Path(source).exists():
        clip = build_clip(suite["architecture"], source)
        assert clip.weights is not None  # a tag was given
        return clip, {"pretrained": {"path": source, "sha256": sha256(clip.weights)}}
    clip = build_clip(suite["architecture"])
    load_pretrained(clip, source)
    return clip, {"pretrained": _file(source)}


def _file(source: str) -> dict[str, str]:
    path = resolve(source)
    return {"path": str(path), "sha256": sha256(path)}


def load_suite(config: Config) -> Suite:
    """Pretrained model, task vectors and heads; experts are read tensor by tensor."""
    suite = config["suite"]
    clip, files = load_clip(suite)
    experts, sources = {}, {"pretrained": str(suite["pretrained"])}
    for task, entry in suite["tasks"].items():
        sources[task] = str(entry["expert"])
        files[task] = _file(sources[task])
        experts[task] = tower_state(read(sources[task]), clip.backbone)
    vectors = TaskVectors(clip.backbone.state_dict(), experts, sources=sources)
    heads = zero_shot_heads(clip, prompts(config), cache_root(config))
    return Suite(clip, vectors, heads, files)


def prompts(config: Config) -> dict[str, Prompts]:
    """Class names and templates per task."""
    return {
        task: Prompts(tuple(map(str, entry["classes"])), tuple(map(str, entry["templates"])))
        for task, entry in config["suite"]["tasks"].items()
    }


def load_data(config: Config, clip: Clip) -> TaskData:
    """The cached images of every task, made on first use."""
    images = {}
    asked = prompts(config)
    for task, entry in config["suite"]["tasks"].items():
        source = entry["data"]
        images[task] = cache_images(
            task,
            open_dataset(task, source),
            asked[task].classes,
            clip.preprocess_cfg,
            cache_root(config),
            config["on_bad_image"],
            str(source.get("image", "image")),
            source.get("label", "label"),
            "label" in source and source["label"] is not None,
        )
    return TaskData(
        images, config["batch_size"], config["seed"], config["protocol"], config["num_workers"]
    )


def build_method(config: Config, suite: Suite) -> MergeMethod:
    """The method on the transformed task vectors."""
    vectors = suite.task_vectors
    for key, part in _targets(config):
        if key.startswith("transform"):
            target, arguments = _target(key, part)
            vectors = _construct(key, target, arguments, {"task_vectors": _always(vectors)})
    target, arguments = _target("method", config["method"])
    method: MergeMethod = _construct("method", target, arguments, _supplied(suite, vectors))
    return method


def _always(value: Any) -> Callable[[], Any]:
    return lambda: value


def _supplied(suite: Suite, vectors: TaskVectors) -> Supplied:
    """What constructors get by name, each made when it is asked for."""
    backbone, heads = suite.clip.backbone, suite.heads
    return {
        "backbone": lambda: backbone,
        "task_vectors": lambda: vectors,
        "heads": lambda: heads,
        "teacher": lambda: Experts(backbone, suite.task_vectors),
        "encoder": lambda: merged_encoder(Tower(backbone), vectors, 0.3),
        "tasks": lambda: heads.tasks,
        "dim": lambda: heads.weight(heads.tasks[0]).shape[1],
    }


def _construct(
    key: str, target: Callable[..., Any], arguments: Mapping[str, Any], supplied: Supplied
) -> Any:
    asked = inspect.signature(target).parameters
    try:
        return call(target, arguments, {n: make() for n, make in supplied.items() if n in asked})
    except AdamergeError:
        raise
    except (TypeError, ValueError) as error:
        raise AdamergeError(f"{key}: {' '.join(str(error).split())}") from error


def build_adaptation(config: Config, suite: Suite, method: MergeMethod) -> Adaptation:
    """The LightningModule of a run."""
    target, arguments = _target("objective", config["objective"])
    supplied = _supplied(suite, suite.task_vectors)
    objective: Objective = _construct("objective", target, arguments, supplied)
    optimizer, settings = _target("optim", config["optim"])
    scheduler = None
    if config["scheduler"] is not None:
        kind, options = _target("scheduler", config["scheduler"])
        scheduler = functools.partial(kind, **options)
    return Adaptation(
        method,
        objective,
        suite.heads,
        normalizer(suite.clip),
        functools.partial(optimizer, **settings),
        scheduler,
        config["micro_batch"],
        config["log_every"],
    )


def normalizer(clip: Clip) -> Normalizer:
    """The backbone's own normalisation."""
    return Normalizer(clip.preprocess_cfg.mean, clip.preprocess_cfg.std)


_DECISIVE = (
    *("suite", "method", "objective", "transform", "protocol", "seed"),
    *("batch_size", "micro_batch", "optim", "scheduler"),
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
    flat["order of tasks"] = ", ".join(config["suite"]["tasks"])
    for name, file in suite.files.items():
        flat[f"sha256 of {name}"] = file["sha256"]
    for task, images in data.tasks.items():
        flat[f"images of {task}"] = images.key
    # Where a file lies does not matter; its content does, and is in the list.
    places = (".expert", ".data.path", "suite.pretrained", "suite.architecture")
    for key in [key for key in flat if key.endswith(places)]:
        del flat[key]
    flat["model config"] = json.dumps(suite.clip.config, sort_keys=True)
    return flat
