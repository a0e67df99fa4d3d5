"""Learning a merge in plain PyTorch: a loop over `step_loss`, for any network and any batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders import rows
from adamerge.encoders.rows import Inputs
from adamerge.learn.classifiers import as_heads
from adamerge.learn.objectives import AnyHeads, Entropy, InfoMax, Objective
from adamerge.learn.step import learnables, step_loss
from adamerge.learn.updates import Part, Step, Update, update_of
from adamerge.methods.base import MergeMethod

Batches = Mapping[str, Iterable[Any]] | Iterable[tuple[Inputs, Tensor]]

_BY_NAME: dict[str, type[Objective]] = {"entropy": Entropy, "infomax": InfoMax}
_LOOK = 10  # steps between two looks at the losses: a GPU has to be waited for


def adapt(
    method: MergeMethod,
    batches: Batches,
    objective: str | Objective | Callable[[Tensor], Tensor] = "entropy",
    heads: AnyHeads | nn.Module | None = None,
    *,
    steps: int = 500,
    lr: float = 1e-3,
    micro_batch: int | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    update: str | Update = "joint",
    seed: int = 0,
) -> Tensor:
    """Learns a merge on unlabeled batches, in place; the same numbers for the same seed.

    Each step merges once and encodes the inputs of all tasks together. It runs where the method is
    (`method.to("cuda")` before), under autocast if called so. Then `method.fold()` is the merge as
    an encoder, and `method.merged_state_dict()` as the state dict of a model of the user's.

    >>> network, a, b = (nn.Linear(4, 3) for _ in range(3))
    >>> vectors = adamerge.TaskVectors(network, {"a": a, "b": b})
    >>> method = adamerge.methods.AdaMerging(network, vectors)
    >>> course = adapt(method, {"a": [torch.randn(8, 4)], "b": [torch.randn(8, 4)]}, steps=5)
    >>> course.shape
    torch.Size([5, 2])

    Args:
        method: what learns.
        batches: a mapping from every task to batches of its inputs (a DataLoader, a list); or one
            iterable of `(inputs, task_ids)`, inputs of any mix of tasks and the number of each
            one's task, `[B]`. Inputs are what the network takes: a tensor, a mapping (called by
            name) or a tuple (argument by argument), without labels. What ends begins anew.
        objective: `entropy`, `infomax`, an objective (which has its own heads), or a function from
            the logits `[B, C]` of one task to its loss `[]`.
        heads: what turns the network's outputs into logits: None, if they are logits; a module
            per task, or one for all tasks, which stay frozen; or an object with `tasks` and
            `logits(features, task)`, such as zero-shot heads, whose parameters that require a
            gradient are learned as well.
        steps: how many are taken.
        lr: the learning rate.
        micro_batch: inputs encoded at a time, see `step_loss`.
        optimizer: called with the learnables and `lr`.
        update: how a step moves what is learned: `joint`, `per_task`, `sam`, `bilevel`,
            `progressive`, or one of `adamerge.learn.updates`, as `Sam(rho=0.1)`.
        seed: of what shuffles, as DataLoaders do; torch's own generator is left as it was.

    Returns:
        The objective's value by step and task, `[steps, T]`, on the CPU.

    Raises:
        AdamergeError: batches, heads or an objective that do not fit; a loss that is not finite:
            then what was learned before it is put back.
    """
    at_a_time = 1 if micro_batch is None else micro_batch
    for name, value, least in (("steps", steps, 0), ("micro_batch", at_a_time, 1)):
        if not isinstance(value, int) or value < least:
            raise AdamergeError(f"{name} is {value!r}: expected a whole number, at least {least}")
    tasks = _tasks(method, batches)
    loss_of = _objective(objective, heads, tasks)
    _check_order(method, batches, tasks, tuple(loss_of.heads.tasks))
    here = learnables(method, loss_of)
    if not here:
        method.shared_weights()  # says what was forgotten
        raise AdamergeError(f"{type(method).__name__} has nothing to learn")
    device, was_training = here[0].device, method.training
    moving = optimizer(here, lr=lr)
    take = update_of(update, seed) if isinstance(update, str) else update
    course, found = _Course(here, loss_of.heads.tasks), []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        loss_of.to(device)
        method.train()
        try:
            for number, (inputs, ids) in enumerate(_steps(batches, loss_of.heads.tasks, steps)):
                batch = rows.each(lambda t: t.to(device, non_blocking=True), inputs), ids

                def compute(part: Part, batch: tuple[Inputs, Tensor] = batch) -> Tensor:
                    own, own_ids = _chosen(*batch, part)
                    moving.zero_grad()
                    loss, values, _ = step_loss(method, loss_of, own, own_ids, micro_batch)
                    loss.backward()
                    found.append(values)
                    return loss

                def move(closure: Callable[[], Tensor], number: int = number) -> None:
                    found.clear()
                    closure()
                    course.add(found[0], number)
                    moving.step()

                loss_of.begin_step(number)
                method.begin_step(number)
                take(Step(compute, move, here, len(loss_of.heads.tasks), number, method))
        finally:
            method.train(was_training)
            method.begin_step(None)
    return course.finish()


class _Course:
    """The values of every step, and what was learned before one that is not finite."""

    def __init__(self, learned: Sequence[Tensor], tasks: Sequence[str]) -> None:
        self._learned, self._tasks = learned, tasks
        self._good = [tensor.detach().clone() for tensor in learned]
        self._values: list[Tensor] = []
        self._fine = 0  # steps that are known to be finite

    def add(self, values: Tensor, step: int) -> None:
        if step < len(self._values):  # of another task, at the same step
            self._values[step] = self._values[step] + values
            self._fine = min(self._fine, step)
            return
        self._values.append(values)
        if len(self._values) % _LOOK == 0:
            self._look()

    def finish(self) -> Tensor:
        self._look()
        return torch.stack(self._values).cpu() if self._values else torch.empty(0, len(self._tasks))

    def _look(self) -> None:
        """Before the optimizer's step: what was learned so far led to these values."""
        recent = self._values[self._fine :]
        if not recent:
            return
        finite = torch.isfinite(torch.stack(recent))
        learned = [bool(torch.isfinite(tensor).all()) for tensor in self._learned]
        if bool(finite.all()) and all(learned):
            self._fine = len(self._values)
            for good, tensor in zip(self._good, self._learned, strict=True):
                good.copy_(tensor.detach())
            return
        with torch.no_grad():
            for good, tensor in zip(self._good, self._learned, strict=True):
                tensor.copy_(good)
        first = int((~finite).any(1).int().argmax())  # the steps after it are its consequence
        step, flags = self._fine + first, zip(self._tasks, finite[first].tolist(), strict=True)
        bad = [task for task, fine in flags if not fine]
        what = f"the loss of task {', '.join(bad)}" if bad else "what is learned"
        raise AdamergeError(
            f"{what} became NaN or infinite at step {step}; what was learned up to step "
            f"{self._fine} is put back: use a lower lr, or look at that task's inputs"
        )


def _tasks(method: MergeMethod, batches: Batches) -> tuple[str, ...]:
    """The tasks in the order of task ids: the method's, or else those of the batches."""
    vectors = vars(method).get("task_vectors")
    found = vars(method).get("tasks") if vectors is None else vectors.tasks
    if found is None and isinstance(batches, Mapping):
        found = tuple(batches)
    if isinstance(batches, Mapping) and found is not None:
        unknown = sorted(set(batches) ^ set(found))
        if unknown:
            raise AdamergeError(
                f"batches are given for {', '.join(batches)}, and {type(method).__name__} merges "
                f"{', '.join(found)}: give batches of every task, under its name"
            )
    return tuple(found or ())


def _check_order(
    method: MergeMethod, batches: Batches, tasks: tuple[str, ...], scored: tuple[str, ...]
) -> None:
    """Task ids are one number for the method and for the heads."""
    if scored != tasks and (isinstance(batches, Mapping) or "tasks" in vars(method)):
        raise AdamergeError(
            f"heads are for {', '.join(scored)}, and {type(method).__name__} merges "
            f"{', '.join(tasks)}: give heads for the same tasks in the same order"
        )


def _objective(objective: Any, heads: Any, tasks: tuple[str, ...]) -> Objective:
    if isinstance(objective, Objective):
        if heads is not None:
            raise AdamergeError(
                f"heads are given twice: {type(objective).__name__} has its own; leave heads out"
            )
        return objective
    if isinstance(objective, str) and objective not in _BY_NAME:
        raise AdamergeError(
            f"objective is {objective!r}: expected {', '.join(_BY_NAME)}, an objective such as "
            "adamerge.objectives.ExpertKL(heads, teacher), or a function of logits"
        )
    if heads is None and not tasks:
        raise AdamergeError("no tasks are known: give heads, a mapping from tasks to modules")
    own = as_heads(heads, tasks)
    if isinstance(objective, str):
        return _BY_NAME[objective](own)
    if not callable(objective):
        raise AdamergeError(
            f"objective is a {type(objective).__name__}: expected {', '.join(_BY_NAME)}, an "
            "objective, or a function from the logits of one task to its loss"
        )
    found = Objective(own)
    found.term = objective  # type: ignore[method-assign]
    return found


def _steps(batches: Batches, tasks: Sequence[str], steps: int) -> Iterator[tuple[Inputs, Tensor]]:
    """The inputs and task ids of every step."""
    if not isinstance(batches, Mapping):
        for item in _endless(batches, "batches", steps):
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise AdamergeError(
                    f"batches give a {type(item).__name__}: expected pairs of inputs and task ids, "
                    "or in batches a mapping from tasks to batches of inputs"
                )
            inputs, task_ids = item
            yield inputs, _ids(task_ids, rows.count(inputs), len(tasks))
        return
    streams = {task: _endless(batches[task], f"batches of task {task!r}", steps) for task in tasks}
    for parts in zip(*streams.values(), strict=True):
        sizes = torch.tensor([rows.count(part) for part in parts])
        yield rows.join(parts), torch.repeat_interleave(torch.arange(len(parts)), sizes)


def _chosen(inputs: Inputs, task_ids: Tensor, part: Part) -> tuple[Inputs, Tensor]:
    """The rows that a loss is of."""
    if part == Part():
        return inputs, task_ids
    present = task_ids.unique().tolist() if part.task is None else [part.task]
    own = torch.cat([part.of((task_ids == task).nonzero().squeeze(1)) for task in present])
    if not len(own) and part.half is not None:
        raise AdamergeError(
            "update=bilevel halves every task's images, and a batch has 1 of each: give at least 2"
        )
    if not len(own):
        raise AdamergeError(
            "update=per_task moves by one task's images after another's, and a batch has none with "
            f"the task id {part.task}: give some of every task in every batch, or use update=joint"
        )
    return rows.each(lambda tensor: tensor[own.to(tensor.device)], inputs), task_ids[own]


def _ids(task_ids: Any, count: int, tasks: int) -> Tensor:
    ids = torch.as_tensor(task_ids).cpu()
    if ids.shape != (count,) or ids.is_floating_point() or not 0 <= ids.min() <= ids.max() < tasks:
        raise AdamergeError(
            f"a batch of {count} inputs has task ids {ids.tolist()}: expected one number of 0 to "
            f"{tasks - 1} for each (a mapping from tasks to batches of inputs needs none)"
        )
    return ids


def _endless(items: Iterable[Any], what: str, steps: int) -> Iterator[Any]:
    """So many items, from the beginning again where they end."""
    taken, source = 0, iter(items)
    while taken < steps:
        before = taken
        for item in source:
            yield item
            taken += 1
            if taken == steps:
                return
        if before == taken:
            raise AdamergeError(
                f"{what} end after {taken} of {steps} steps: give a list or a DataLoader, which "
                f"begins anew, or steps={taken}"
            )
        source = iter(items)
