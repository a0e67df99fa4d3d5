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

from adamerge import hub
from adamerge.adaptation import Adaptation
from adamerge.binding import call, find, function_to, nearest, problems, subclass_of
from adamerge.checkpoints import Checkpoint, load_pretrained, read, read_head, sha256, tower_state
from adamerge.config import Config
from adamerge.config import problems as problems_of_config
from adamerge.data import TaskData
from adamerge.encoders import Clip, Normalizer, build_clip
from adamerge.errors import AdamergeError
from adamerge.heads import Heads, Prompts, zero_shot_heads
from adamerge.image_cache import TaskImages, cache_images
from adamerge.methods.base import MergeMethod
from adamerge.objectives import Objective
from adamerge.sources import data_problems, open_dataset
from adamerge.suite_files import entries, require_root
from adamerge.supplies import SUPPLIED, Supplies, base_problems, split_base, supplies
from adamerge.task_vectors import TaskVectors

# Arguments of Lightning's Trainer that make sense here: others would be set twice, cut the endless
# stream of batches into epochs, or count steps in another way.
_TRAINER = (
    *("max_steps", "max_time", "accelerator", "devices", "num_nodes", "strategy", "precision"),
    *("gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark", "plugins"),
)
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
    for where, entry in entries(config["suite"]):
        if entry.get("data") is not None:
            found += data_problems(f"{where}.data", entry["data"])
    for key, part in _targets(config):
        try:
            target, arguments = _target(key, part)
        except AdamergeError as error:
            found.append(str(error))
            continue
        if key == "method":
            arguments, own = split_base(target, arguments)
            found += base_problems(own)
        found += problems(target, arguments, key, _KINDS[key.partition("[")[0]][2])
    found = found or _trial(config)
    if found:
        raise AdamergeError("; ".join(found))


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
    """The pretrained CLIP of a suite and the record of its file."""
    source, architecture = str(suite["pretrained"]), suite.get("architecture")
    if architecture in open_clip.list_models() and not (
        Path(source).exists() or hub.is_hub(source)
    ):
        clip = build_clip(str(architecture), source)
        assert clip.weights is not None  # a tag was given
        return clip, {"pretrained": {"path": source, "sha256": sha256(clip.weights)}}
    checkpoint = read(source)
    clip = build_clip(_architecture(architecture, checkpoint))
    load_pretrained(clip, checkpoint)
    _check_stated(clip, checkpoint, str(architecture))
    return clip, {"pretrained": checkpoint.record()}


def _check_stated(clip: Clip, checkpoint: Checkpoint, architecture: str) -> None:
    """Refuses weights whose own config states what the architecture has not, though shapes fit."""
    model, stated = clip.config["model_cfg"], checkpoint.stated()
    vision = model["vision_cfg"]
    built = {
        "quick_gelu": bool(model.get("quick_gelu")),
        "heads": vision.get("width", 768) // vision.get("head_width", 64),
        "layer_norm_eps": 1e-5,
    }
    for key in ("heads", "layer_norm_eps"):
        if stated and stated[key] != built[key]:
            raise AdamergeError(
                f"{checkpoint.source} was trained with {key} = {stated[key]} in its image tower, "
                f"{architecture} has {built[key]}, though all shapes fit: set suite.architecture "
                "to the model it was trained as"
            )
    if not stated or stated["quick_gelu"] == built["quick_gelu"]:
        return
    gelu = stated["quick_gelu"]
    name = architecture.removesuffix("-quickgelu") + ("-quickgelu" if gelu else "")
    mend = name if name in open_clip.list_models() else f"one with quick_gelu: {str(gelu).lower()}"
    raise AdamergeError(
        f"{checkpoint.source} was trained with another activation than {architecture} has "
        f"(QuickGELU or not), which silently costs accuracy: set suite.architecture to {mend}"
    )


def _architecture(given: Any, pretrained: Checkpoint) -> str:
    """The architecture as named, fetched from the hub, or as the pretrained's folder says."""
    if given is not None:
        return str(hub.fetch(str(given)).path) if hub.is_hub(str(given)) else str(given)
    folder = pretrained.files[0].parent
    if any((folder / name).is_file() for name in ("open_clip_config.json", "config.json")):
        return str(folder)
    raise AdamergeError(
        f"the architecture is not named (suite.architecture, or --architecture), and {folder} has "
        "no open_clip_config.json or config.json that would tell it: name an open_clip model, like "
        "ViT-B-32-quickgelu"
    )


def load_suite(config: Config) -> Suite:
    """Pretrained model, task vectors and heads; experts are read tensor by tensor."""
    suite = config["suite"]
    require_root(suite)
    clip, files = load_clip(suite)
    experts, sources = {}, {"pretrained": str(suite["pretrained"])}
    for task, entry in suite["tasks"].items():
        expert = read(str(entry["expert"]))
        sources[task], files[task] = expert.source, expert.record()
        experts[task] = tower_state(expert, clip.backbone)
        _check_stated(clip, expert, str(suite.get("architecture")))
        if entry.get("head") is not None:
            files[f"head of {task}"] = read(entry["head"]).record()
    vectors = TaskVectors(clip.backbone.state_dict(), experts, sources=sources, share=True)
    return Suite(clip, vectors, load_heads(config, clip), files)


def load_heads(config: Config, clip: Clip, part: str = "tasks") -> Heads:
    """Zero-shot heads, but for tasks whose `head:` names a stored one."""
    stored = {
        task: read_head(entry["head"])
        for task, entry in config["suite"][part].items()
        if entry.get("head") is not None
    }
    return zero_shot_heads(clip, prompts(config, part), cache_root(config), stored)


def prompts(config: Config, part: str = "tasks") -> dict[str, Prompts]:
    """Class names and templates per task; `part` is `tasks` or `unseen`."""
    return {
        task: Prompts(tuple(map(str, entry["classes"])), tuple(map(str, entry["templates"])))
        for task, entry in (config["suite"].get(part) or {}).items()
    }


def load_data(config: Config, clip: Clip) -> TaskData:
    """The cached images of every merged task, made on first use."""
    images = _load_images(config, clip, "tasks")
    return TaskData(
        images, config["batch_size"], config["seed"], config["protocol"], config["num_workers"]
    )


def load_unseen(config: Config, clip: Clip) -> tuple[Heads, TaskData] | None:
    """Heads and images of the tasks that are only scored, all of their images; None without any.

    They are kept apart from those of the merged tasks, which is all that a method, an objective
    and the batches get.
    """
    asked = prompts(config, "unseen")
    if not asked:
        return None
    images = _load_images(config, clip, "unseen")
    return load_heads(config, clip, "unseen"), TaskData(images)


def _load_images(config: Config, clip: Clip, part: str) -> dict[str, TaskImages]:
    images = {}
    for task, asked in prompts(config, part).items():
        source = config["suite"][part][task]["data"]
        images[task] = cache_images(
            task,
            open_dataset(task, source, part),
            asked.classes,
            clip.preprocess_cfg,
            cache_root(config),
            config["on_bad_image"],
            str(source.get("image", "image")),
            source.get("label", "label"),
            "label" in source and source["label"] is not None,
        )
    return images


def build_method(config: Config, suite: Suite) -> MergeMethod:
    """The method on the transformed task vectors."""
    vectors = suite.task_vectors
    for key, part in _targets(config):
        if key.startswith("transform"):
            target, arguments = _target(key, part)
            given: Supplies = {"task_vectors": functools.partial(_itself, vectors)}
            vectors = _construct(key, target, arguments, given)
    target, arguments = _target("method", config["method"])
    arguments, own = split_base(target, arguments)
    given = supplies(suite.clip, suite.task_vectors, vectors, suite.heads, own, suite.files)
    method: MergeMethod = _construct("method", target, arguments, given)
    return method


def _itself(vectors: TaskVectors) -> TaskVectors:
    return vectors


def _construct(
    key: str, target: Callable[..., Any], arguments: Mapping[str, Any], supplied: Supplies
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
    vectors = suite.task_vectors
    supplied = supplies(suite.clip, vectors, vectors, suite.heads, {}, suite.files)
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
    )
    aside = ("suite.unseen", "suite.vars.")  # only scored; already in what they stand in
    for key in [key for key in flat if key.endswith(places) or key.startswith(aside)]:
        del flat[key]
    flat["model config"] = json.dumps(suite.clip.config, sort_keys=True)
    return flat
