"""From a checked configuration to what learns: method, objective, optimizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from adamerge._base.errors import AdamergeError
from adamerge.config.aligned import align_problems, asks_images
from adamerge.config.arguments import base_problems, base_settings, supplied
from adamerge.config.inputs import Suite, normalizer
from adamerge.config.settings import Config
from adamerge.config.settings import problems as problems_of_config
from adamerge.config.side_by_side import side_by_side_problems
from adamerge.config.statistics import statistics
from adamerge.config.suite import entries
from adamerge.config.targets import KINDS, Supplied, asks, build, target_of, target_problems
from adamerge.config.trainer import run_device, trainer_problems
from adamerge.encoders.architectures import architecture_names
from adamerge.images.sources import data_problems
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.blocks import refuse_inside
from adamerge.learn.classifiers import LearnedHeads
from adamerge.learn.data import TaskData
from adamerge.learn.objectives import Objective
from adamerge.learn.step import learnables, refused_micro_batch
from adamerge.learn.updates import blocks_of, update_of
from adamerge.methods.base import MergeMethod, tracing
from adamerge.weights.task_vectors import TaskVectors

_MAPPINGS = ("suite", "method", "objective", "optim", "task_vectors", "trainer")


def check(config: Config) -> None:
    """Checks all of a configuration before anything is loaded.

    Raises:
        AdamergeError: all problems in one message: unknown keys, mistyped values, dotted paths
            that lead nowhere or do not fit their arguments.
    """
    found = problems_of_config(config)
    if all(isinstance(config[key], dict) for key in _MAPPINGS):
        found += _part_problems(config) or ([] if found else _trial(config))
    if found:
        raise AdamergeError("; ".join(_once(found)))


def _once(found: Iterable[str]) -> list[str]:
    """Problems without those that say again that a setting has that value."""
    by_value: dict[str, str] = {}
    for problem in found:
        setting, colon, _ = problem.partition(":")
        by_value.setdefault(setting if colon and " is " in setting else problem, problem)
    return list(by_value.values())


def _part_problems(config: Config) -> list[str]:
    """What is wrong with arguments of functions and classes, and with settings side by side."""
    found = trainer_problems(config["trainer"])
    for where, entry in entries(config["suite"]):
        if entry.get("data") is not None:
            found += data_problems(f"{where}.data", entry["data"])
    found += [*align_problems(config["suite"]), *_method_problems(config)]
    for key in ("objective", "optim", "scheduler"):
        if config[key] is not None:
            found += target_problems(key, config[key], KINDS[key])
    for index, part in enumerate(_transforms(config)):
        found += target_problems(f"transform[{index}]", part, KINDS["transform"])
    return found + side_by_side_problems(config) + _label_problems(config)


def learns_from_labels(config: Config) -> bool:
    """Whether a run's objective is given the true labels."""
    target, _ = target_of("objective", config["objective"], KINDS["objective"])
    return bool(getattr(target, "sees_labels", False)) and config["trainer"]["max_steps"] != 0


def _label_problems(config: Config) -> list[str]:
    try:
        learns = learns_from_labels(config)
    except AdamergeError:
        return []  # said elsewhere
    asked = config["objective"].get("scored_images") is True
    if not learns or asked or config["protocol"] != "paper":
        return []
    return [
        "the objective learns from true labels, and protocol=paper scores the same images by them: "
        "set protocol=heldout, or, for an upper bound, objective.scored_images=true"
    ]


def _transforms(config: Config) -> list[Any]:
    return config["transform"] if isinstance(config["transform"], list) else []


def _method(config: Config) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    """The class of the method, its part of the configuration, and what `base` is made of."""
    target, arguments = target_of("method", config["method"], KINDS["method"])
    given = base_settings(target, arguments)
    return target, {k: v for k, v in config["method"].items() if k not in given}, given


def _method_problems(config: Config) -> list[str]:
    """Wrong settings of a method, and ways to keep task vectors that it does not go with."""
    try:
        method, part, given = _method(config)
    except AdamergeError as error:
        return [str(error)]
    found = base_problems(given) + target_problems("method", part, KINDS["method"])
    found = found or _step_problems(method, part, config["trainer"].get("max_steps"))
    asked, name = config["task_vectors"], method.__name__
    smaller = asked["dtype"] != "float32" or asked["device"] in ("host", "disk")
    if getattr(method, "combines", False):
        return found
    if asked["shard"]:
        found.append(
            f"task_vectors.shard is set, but {name} does not learn merging coefficients of "
            "whole layers: leave it out, or use AdaMerging"
        )
    held = "task_vectors" in inspect.signature(method).parameters
    if smaller and held and not asked["shard"] and not getattr(method, "streams", False):
        found.append(
            f"task_vectors.dtype and .device are set, but {name} holds task vectors of its own "
            "making: leave them as they are, or use AdaMerging (a method of yours that uses "
            "TaskVectors.combine alone says so by `combines = True`)"
        )
    return found


def _step_problems(method: Callable[..., Any], part: Config, steps: Any) -> list[str]:
    """What a method says of its settings and a number of steps."""
    usual = {n: p.default for n, p in inspect.signature(method).parameters.items()}
    known = type(steps) is int  # else it is said elsewhere
    return cast(type[MergeMethod], method).problems({**usual, **part}, steps) if known else []


def _trial(config: Config, shapes: Iterable[Sequence[int]] = ((2, 2),)) -> list[str]:
    """Optimizer and scheduler judge their values by one step on parameters that are thrown away.

    Args:
        shapes: of what they are to learn.
    """
    key, learned = "optim", [torch.nn.Parameter(torch.zeros(tuple(shape))) for shape in shapes]
    try:
        optimizer = _optimizer(config["optim"], learned)
        for parameter in learned:
            parameter.grad = torch.zeros_like(parameter)
        key, part = "scheduler", _scheduler_part(config)
        scheduler = _scheduler(part, optimizer) if part is not None else None
        if not config["optim"].get("capturable"):  # such a step is for a GPU
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


def _optimizer(part: Config, params: Any) -> Any:
    return build("optim", part, KINDS["optim"], {"params": lambda: params})


def _scheduler(part: Config, optimizer: torch.optim.Optimizer) -> Any:
    return build("scheduler", part, KINDS["scheduler"], {"optimizer": lambda: optimizer})


def _scheduler_part(config: Config) -> Config | None:
    """None where no step is taken: of none, schedulers cannot be made."""
    part: Config | None = config["scheduler"]
    return part if config["trainer"].get("max_steps") != 0 else None


def asks_statistics(config: Config) -> bool:
    """Whether the result depends on statistics of unlabeled images."""
    parts = [("method", config["method"]), *(("transform", p) for p in _transforms(config))]
    asked = any(asks(target_of(key, part, KINDS[key])[0]) for key, part in parts)
    return asked or asks_images(config["suite"])


def build_method(config: Config, suite: Suite, data: TaskData | None = None) -> MergeMethod:
    """The method on the transformed task vectors.

    Args:
        data: the images that transforms and methods may ask for statistics of.
    """
    vectors = suite.task_vectors
    of_images = {} if data is None else statistics(config, suite, data)
    for index, part in enumerate(_transforms(config)):
        if vectors.per_task:
            before = _transforms(config)[index - 1]["_target_"].rpartition(".")[2]
            raise AdamergeError(
                f"transform[{index - 1}] ({before}) makes an encoder of its own for every task, "
                "whose vectors no other transform can take: let it be the last"
            )
        given: Supplied = {"task_vectors": functools.partial(_itself, vectors), **of_images}
        vectors = _transformed(f"transform[{index}]", part, config, suite, given)
    if vectors is not suite.task_vectors:  # from here on only read, so that the type may be small
        vectors = vectors.stored(replace(vectors.storage, dtype=config["task_vectors"]["dtype"]))
    _, part, base = _method(config)
    values = {**supplied(suite, vectors, base, config["protocol"]), **of_images}
    values = {**values, "device": lambda: run_device(config["trainer"])}
    method: MergeMethod = build("method", part, KINDS["method"], values)
    return method


def _itself(vectors: TaskVectors) -> TaskVectors:
    return vectors


def _transformed(key: str, part: Any, config: Config, suite: Suite, given: Supplied) -> TaskVectors:
    values: Supplied = {
        **given,
        "architecture": lambda: architecture_names(suite.clip.config),
        "experts": lambda: suite.task_vectors,
        "device": lambda: run_device(config["trainer"]),
    }
    made: TaskVectors = build(key, part, KINDS["transform"], values)
    return made


def build_adaptation(config: Config, suite: Suite, method: MergeMethod) -> Adaptation:
    """The LightningModule of a run."""
    heads = LearnedHeads(suite.heads) if config["heads"] == "learned" else suite.heads
    values = supplied(suite, suite.task_vectors, {}, config["protocol"])
    values = {**values, "heads": lambda: heads}
    objective: Objective = build("objective", config["objective"], KINDS["objective"], values)
    _check_pair(config, method, objective)
    scheduler = _scheduler_part(config)
    return Adaptation(
        method,
        objective,
        heads,
        normalizer(suite.clip),
        functools.partial(_optimizer, config["optim"]),
        None if scheduler is None else functools.partial(_scheduler, scheduler),
        config["micro_batch"],
        config["log_every"],
        config["cuda_graph"] and _can_be_recorded(config) and not method.staged,
        update_of(config["update"], config["seed"]),
    )


def _check_pair(config: Config, method: MergeMethod, objective: Objective) -> None:
    """Refuses what the first step would refuse."""
    name = type(method).__name__
    if objective.traces:
        tracing(method)
    if config["micro_batch"] is not None and method.mixes_images:
        raise refused_micro_batch()
    if config["update"]["name"] == "progressive":
        blocks_of(method)
    if config["update"]["name"] == "bilevel" and not method.below:
        raise AdamergeError(
            f"update=bilevel wants something to learn below something else, and {name} with these "
            "settings has no such thing: use it with method=concrete, or update=joint"
        )
    if config["task_vectors"]["shard"] and not hasattr(method, "task_vectors"):
        raise AdamergeError(
            f"task_vectors.shard looks for them in {name}.task_vectors, which is "
            "not there: keep them under that name, or set task_vectors.shard=false"
        )
    for setting in ("compile", "recompute"):
        if config[setting]:
            refuse_inside(method, setting)
    if not method.has_learnables and config["trainer"]["max_steps"] != 0:
        raise AdamergeError(
            f"{name} has nothing to learn: set trainer.max_steps=0, or use method=layer_wise on a "
            "transform to learn on top of a merge"
        )
    shapes = dict.fromkeys(tuple(tensor.shape) for tensor in learnables(method, objective))
    if shapes and (refused := _trial(config, shapes)):
        raise AdamergeError(
            f"{refused[0]}: {name} with these settings learns tensors of shape "
            f"{', '.join(map(str, shapes))}; use an optimizer for them, as torch.optim.Adam"
        )


def _can_be_recorded(config: Config) -> bool:
    """Whether every step is the same work on the GPU, and needs nothing from elsewhere."""
    kept = config["task_vectors"]
    elsewhere = kept["device"] in ("host", "disk") or kept["shard"]
    return not (elsewhere or config["recompute"]) and config["update"]["name"] == "joint"
