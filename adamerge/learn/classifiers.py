"""Heads of any kind, as an objective asks for them: zero-shot ones, classifiers, or none."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.heads import Heads, classify


@runtime_checkable
class TaskHeads(Protocol):
    """What an objective asks of the heads (see `adamerge.heads.Heads`)."""

    @property
    def tasks(self) -> Sequence[str]:
        """The T tasks, the order of task ids."""
        ...

    def logits(self, features: Tensor, task: str) -> Tensor:
        """`[B, D] -> [B, C]` of a task."""
        ...


class Classifiers(nn.Module):
    """A classifier per task: any modules from features `[B, D]` to logits `[B, C]`.

    >>> heads = Classifiers({"a": nn.Linear(8, 3), "b": nn.Linear(8, 5)})
    >>> heads.logits(torch.ones(2, 8), "b").shape
    torch.Size([2, 5])

    Args:
        classifiers: by task, in the order of the task ids; copied, and frozen in evaluation mode.
    """

    def __init__(self, classifiers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = tuple(classifiers)
        own = [copy.deepcopy(classifier) for classifier in classifiers.values()]
        self.by_task = nn.ModuleList(own).requires_grad_(False).eval()

    def logits(self, features: Tensor, task: str) -> Tensor:
        """`[B, D] -> [B, C]` of a task."""
        found = self.by_task[self.tasks.index(task)](features)
        if not isinstance(found, Tensor) or found.ndim != 2:
            kind = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise AdamergeError(
                f"the head of task {task!r} gives {kind}: expected logits [B, C], one row per input"
            )
        return found

    def train(self, mode: bool = True) -> Classifiers:
        """Stays in evaluation mode."""
        return self


class LearnedHeads(nn.Module):
    """Zero-shot heads that are learned along, each with a bias that starts at 0.

    An objective that has them learns them. An expert's predictions stay those of the zero-shot
    heads.

    Args:
        zero_shot: where they start; left unchanged.
    """

    def __init__(self, zero_shot: Heads) -> None:
        super().__init__()
        self.zero_shot, self.tasks, self.classes = zero_shot, zero_shot.tasks, zero_shot.classes
        own = [zero_shot.weight(task).detach() for task in self.tasks]
        self.weights = nn.ParameterList(weight.clone() for weight in own)
        self.biases = nn.ParameterList(weight.new_zeros(len(weight)) for weight in own)

    def logits(self, features: Tensor, task: str) -> Tensor:
        """`[B, D]` features (normalised here) -> `[B, C]` logits of a task."""
        row = self.tasks.index(task)
        return classify(features, self.weights[row], self.biases[row])

    def frozen(self) -> Heads:
        """Copies as they are now, on the CPU."""
        weights, biases = (
            {t: p.detach().cpu().clone() for t, p in zip(self.tasks, own, strict=True)}
            for own in (self.weights, self.biases)
        )
        return Heads(weights, self.classes, biases)


class Logits:
    """No heads: what the network gives are the logits `[B, C]`.

    Args:
        tasks: in the order of the task ids.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)

    def logits(self, features: Tensor, task: str) -> Tensor:
        """The features themselves."""
        return features


def as_heads(heads: Any, tasks: Sequence[str] = ()) -> TaskHeads:
    """What a user gives for heads, as an objective asks for them.

    Args:
        heads: an object with `tasks` and `logits`, as it is; a mapping task -> module; one module
            for all `tasks`; or None, where the network gives logits.

    Raises:
        AdamergeError: anything else, or a mapping without one of `tasks`.
    """
    if isinstance(heads, nn.ModuleDict):
        heads = dict(heads.items())
    if isinstance(heads, nn.Module) and tasks and not isinstance(heads, TaskHeads):
        heads = dict.fromkeys(tasks, heads)
    if isinstance(heads, Mapping) and all(isinstance(h, nn.Module) for h in heads.values()):
        missing = [task for task in tasks if task not in heads]
        if missing or not heads:
            raise AdamergeError(
                f"there is no head for task {missing[0] if missing else ''!r} among "
                f"{', '.join(map(str, heads)) or 'none'}: give a module per task"
            )
        return Classifiers({task: heads[task] for task in tasks or heads})
    if heads is None and tasks:
        return Logits(tasks)
    if isinstance(heads, TaskHeads):
        return heads
    raise AdamergeError(
        f"heads is a {type(heads).__name__}: expected a mapping from tasks to modules, an object "
        "with tasks and logits(features, task), or (in adamerge.adapt) one module or None"
    )
