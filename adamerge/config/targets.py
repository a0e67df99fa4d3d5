"""`_target_: dotted.path` in a configuration, at any depth: checked, then built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from adamerge._base.binding import call, find, function_to, problems, subclass_of
from adamerge._base.errors import AdamergeError
from adamerge.align.symmetry import Permutations
from adamerge.learn.objectives import Objective
from adamerge.methods.base import MergeMethod
from adamerge.weights.task_vectors import TaskVectors

Supplied = Mapping[str, Callable[[], Any]]  # by name, what makes an argument that is asked for
SUPPLIED = ("backbone", "task_vectors", "heads", "teacher", "encoder", "tasks", "dim", "base")


class Kind(NamedTuple):
    """What a part of a configuration, and the parts in it, may name.

    Attributes:
        accepts: whether an object is of the kind.
        expected: the kind in words.
        supplied: the arguments that are given where they are asked for.
        package: the only one that anything is imported from; empty: any.
    """

    accepts: Callable[[Any], bool]
    expected: str
    supplied: tuple[str, ...]
    package: str = ""


_SCHEDULER = torch.optim.lr_scheduler.LRScheduler
_TRANSFORM = "a function from TaskVectors annotated to return TaskVectors"
STATISTICS = ("images", "inputs", "gradients")  # of unlabeled images
_TO_METHOD = (*SUPPLIED, "device", *STATISTICS)
_TO_ALIGN = ("spec", "reference", "state", "start", "reference_module", "module", "batches")
_GIVEN = ("task_vectors", "architecture", "experts", "device", *STATISTICS)  # to a transform
KINDS = {
    "method": Kind(subclass_of(MergeMethod), "a MergeMethod class", _TO_METHOD),
    "objective": Kind(subclass_of(Objective), "an Objective class", SUPPLIED),
    "optim": Kind(subclass_of(torch.optim.Optimizer), "a torch optimizer class", ("params",)),
    "scheduler": Kind(
        subclass_of(_SCHEDULER), "a torch learning-rate scheduler class", ("optimizer",)
    ),
    "transform": Kind(function_to(TaskVectors), _TRANSFORM, _GIVEN),
    "align": Kind(
        function_to(Permutations), "a function annotated to return Permutations", _TO_ALIGN
    ),
}


def asks(target: Callable[..., Any]) -> bool:
    """Whether a transform or method asks for anything of unlabeled images."""
    return any(name in STATISTICS for name in inspect.signature(target).parameters)


def target_of(key: str, part: Any, kind: Kind) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a part's `_target_` names, and the arguments beside it.

    Raises:
        AdamergeError: no `_target_`, or one that leads to nothing of the kind.
    """
    if not isinstance(part, Mapping) or "_target_" not in part:
        raise AdamergeError(f"{key} has no _target_: expected the dotted path of {kind.expected}")
    arguments = {name: value for name, value in part.items() if name not in ("_target_", "name")}
    path = str(part["_target_"])
    if not path.startswith(kind.package):
        raise AdamergeError(f"{key}._target_: {path!r} is not {kind.expected}")
    return find(path, key, kind.accepts, kind.expected), arguments


def target_problems(key: str, part: Any, kind: Kind) -> list[str]:
    """What is wrong with a part and those in it: paths that lead nowhere, wrong arguments."""
    found: list[str] = []
    for where, inner in [(key, part), *_parts_in(key, part)]:
        try:
            found += problems(*target_of(where, inner, kind), where, kind.supplied)
        except AdamergeError as error:
            found.append(str(error))
    return found


def _parts_in(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Whatever has a `_target_` within a value, and where it stands."""
    items = enumerate(value) if isinstance(value, list) else ()
    for name, inner in value.items() if isinstance(value, Mapping) else items:
        if isinstance(inner, Mapping) and "_target_" in inner:
            yield f"{key}.{name}", inner
        yield from _parts_in(f"{key}.{name}", inner)


def build(key: str, part: Any, kind: Kind, supplied: Supplied) -> Any:
    """A value with every `_target_` in it called, from the innermost outwards.

    Raises:
        AdamergeError: what a target says of its arguments.
    """
    if isinstance(part, list):
        return [build(f"{key}.{i}", inner, kind, supplied) for i, inner in enumerate(part)]
    if not isinstance(part, Mapping):
        return part
    values = {name: build(f"{key}.{name}", v, kind, supplied) for name, v in part.items()}
    if "_target_" not in part:
        return values
    target, arguments = target_of(key, values, kind)
    asked = inspect.signature(target).parameters
    try:
        given = {name: make() for name, make in supplied.items() if name in asked}
        return call(target, arguments, given)
    except AdamergeError:
        raise
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise AdamergeError(f"{key}: {' '.join(str(error).split())[:300]}") from error
