"""From a checked configuration to what learns: method, objective, optimizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from adamerge._base.binding import call, find, function_to, nearest, problems, subclass_of
from adamerge._base.errors import AdamergeError
from adamerge.config.arguments import SUPPLIED, Supplies, base_problems, split_base, supplies
from adamerge.config.inputs import Suite, normalizer
from adamerge.config.settings import Config
from adamerge.config.settings import problems as problems_of_config
from adamerge.config.settings_check import shape_problems
from adamerge.config.suite_files import entries
from adamerge.encoders.architectures import architecture_names
from adamerge.images.sources import data_problems
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.blocks import refuse_compiling, refuse_recomputing
from adamerge.learn.classifiers import LearnedHeads
from adamerge.learn.objectives import Objective
from adamerge.learn.step import refused_micro_batch
from adamerge.learn.updates import update_of
from adamerge.methods.base import MergeMethod, tracing
from adamerge.weights.task_vectors import TaskVectors

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
        ("task_vectors", "architecture", "experts"),
    ),
}


def check(config: Config) -> None:
    """Checks all of a configuration before anything is loaded.

    Raises:
        AdamergeError: all problems in one message: unknown keys, mistyped values, dotted paths
            that lead nowhere or do not fit their arguments.
    """
    found = problems_of_config(config)
    if shapeless := shape_problems(config):
        raise AdamergeError("; ".join(dict.fromkeys([*found, *shapeless])))
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
            found += base_problems(own) + _storage_problems(config, target)
        found += problems(target, arguments, key, _KINDS[key.partition("[")[0]][2])
    if config["compile"] is True and config["recompute"] is True:
        found.append(
            "compile and recompute do not go together: set one of them to false (compiled blocks "
            "choose for themselves what to compute again)"
        )
    if config["images_on_device"] is True and config["num_workers"] != 0:
        found.append(
            "images_on_device leaves nothing for num_workers to read ahead: set num_workers=0"
        )
    found = found or _update_problems(config) or _trial(config)
    if found:
        raise AdamergeError("; ".join(found))


def _update_problems(config: Config) -> list[str]:
    try:
        update_of(config["update"])
    except AdamergeError as error:
        return [str(error)]
    if config["heads"] == "learned" and config["trainer"].get("devices") not in (1, "1", "auto"):
        return ["heads=learned wants one process: set trainer.devices=1"]
    if config["online"] and config["update"]["name"] == "per_task":
        return [
            "online lets a task end before others, which update=per_task would ask for: set "
            "update=joint"
        ]
    return []


def _storage_problems(config: Config, method: Callable[..., Any]) -> list[str]:
    """Ways to keep task vectors that a method does not go with."""
    asked, name = config["task_vectors"], method.__name__
    if getattr(method, "combines", False):
        return []
    if asked["shard"]:
        return [
            f"task_vectors.shard is set, but {name} does not learn merging coefficients of "
            "whole layers: leave it out, or use AdaMerging"
        ]
    smaller = asked["dtype"] != "float32" or asked["device"] in ("host", "disk")
    if smaller and "task_vectors" in inspect.signature(method).parameters:
        return [
            f"task_vectors.dtype and .device are set, but {name} holds task vectors of its own "
            "making: leave them as they are, or use AdaMerging (a method of yours that uses "
            "TaskVectors.combine alone says so by `combines = True`)"
        ]
    return []


def _trial(config: Config, shapes: Iterable[Sequence[int]] = ((2, 2),)) -> list[str]:
    """Optimizer and scheduler judge their values by one step on parameters that are thrown away.

    Args:
        shapes: of what they are to learn.
    """
    key, learned = "optim", [torch.nn.Parameter(torch.zeros(tuple(shape))) for shape in shapes]
    try:
        kind, arguments = _target(key, config[key])
        optimizer = kind(learned, **arguments)
        for parameter in learned:
            parameter.grad = torch.zeros_like(parameter)
        scheduler = None
        if config["scheduler"] is not None:
            key = "scheduler"
            kind, options = _target(key, config[key])
            scheduler = kind(optimizer, **options)
        if not arguments.get("capturable"):  # such a step is for a GPU
            key = "optim"
            optimizer.step(lambda: torch.zeros(()))
        if scheduler is not None:
            key = "scheduler"
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


def build_method(config: Config, suite: Suite) -> MergeMethod:
    """The method on the transformed task vectors."""
    vectors = suite.task_vectors
    for key, part in _targets(config):
        if key.startswith("transform"):
            target, arguments = _target(key, part)
            given: Supplies = {
                "task_vectors": functools.partial(_itself, vectors),
                "architecture": functools.partial(architecture_names, suite.clip.config),
                "experts": functools.partial(_itself, suite.task_vectors),
            }
            vectors = _construct(key, target, arguments, given)
    if vectors is not suite.task_vectors:  # from here on only read, so that the type may be small
        vectors = vectors.stored(replace(vectors.storage, dtype=config["task_vectors"]["dtype"]))
    target, arguments = _target("method", config["method"])
    arguments, own = split_base(target, arguments)
    known = (suite.clip, suite.task_vectors, vectors, suite.heads)
    given = supplies(*known, own, suite.files, config["protocol"], suite.digest)
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
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise AdamergeError(f"{key}: {' '.join(str(error).split())[:300]}") from error


def _check_pair(method: MergeMethod, objective: Objective, micro_batch: int | None) -> None:
    """Refuses what the first step would refuse."""
    if objective.traces:
        tracing(method)
    if micro_batch is not None and method.mixes_images:
        raise refused_micro_batch()


def build_adaptation(config: Config, suite: Suite, method: MergeMethod) -> Adaptation:
    """The LightningModule of a run."""
    target, arguments = _target("objective", config["objective"])
    vectors = suite.task_vectors
    heads = LearnedHeads(suite.heads) if config["heads"] == "learned" else suite.heads
    known = (suite.clip, vectors, vectors, heads)
    supplied = supplies(*known, {}, suite.files, config["protocol"])
    objective: Objective = _construct("objective", target, arguments, supplied)
    _check_pair(method, objective, config["micro_batch"])
    if config["task_vectors"]["shard"] and not hasattr(method, "task_vectors"):
        raise AdamergeError(
            f"task_vectors.shard looks for them in {type(method).__name__}.task_vectors, which is "
            "not there: keep them under that name, or set task_vectors.shard=false"
        )
    if config["compile"]:
        refuse_compiling(method)
    if config["recompute"]:
        refuse_recomputing(method)
    shapes = dict.fromkeys(tuple(parameter.shape) for parameter in method.parameters())
    if refused := _trial(config, shapes):
        raise AdamergeError(
            f"{refused[0]}: {type(method).__name__} with these settings learns tensors of shape "
            f"{', '.join(map(str, shapes))}; use an optimizer for them, as torch.optim.Adam"
        )
    optimizer, settings = _target("optim", config["optim"])
    scheduler = None
    if config["scheduler"] is not None:
        kind, options = _target("scheduler", config["scheduler"])
        scheduler = functools.partial(kind, **options)
    return Adaptation(
        method,
        objective,
        heads,
        normalizer(suite.clip),
        functools.partial(optimizer, **settings),
        scheduler,
        config["micro_batch"],
        config["log_every"],
        config["cuda_graph"] and _can_be_recorded(config),
        update_of(config["update"], config["seed"]),
    )


def _can_be_recorded(config: Config) -> bool:
    """Whether every step is the same work on the GPU, and needs nothing from elsewhere."""
    kept = config["task_vectors"]
    elsewhere = kept["device"] in ("host", "disk") or kept["shard"]
    return not (elsewhere or config["recompute"])
