"""Learned merges give the second set's reference numbers: objectives, updates, learnables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import adamerge
from adamerge.encoders import Experts
from adamerge.learn.classifiers import LearnedHeads
from adamerge.learn.losses import expert_labels as expert_labels_of
from adamerge.learn.step import step_loss
from adamerge.learn.updates import Joint, Part, PerTask, Sam, Step, Update
from adamerge.methods import AdaMerging, MergeMethod
from tests import golden_data as golden
from tests import golden_more_data as more

Objective = adamerge.objectives.Objective


def merging(dtype: torch.dtype, **settings: Any) -> AdaMerging:
    return AdaMerging(golden.clip().backbone, golden.task_vectors(dtype), **settings)


def experts(dtype: torch.dtype) -> Experts:
    return Experts(golden.clip().backbone, golden.task_vectors(dtype))


class Course:
    """Steps as a run takes them, on batch s at step s, and what was seen on the way."""

    def __init__(
        self, method: MergeMethod, objective: Objective, dtype: torch.dtype, update: Update
    ) -> None:
        self.method, self.objective, self.dtype, self.update = method, objective, dtype, update
        self.learned = [*dict.fromkeys([*method.parameters(), *objective.parameters()])]
        self.course: list[list[Tensor]] = []  # by step, the loss of every pass

    def run(self, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> Tensor:
        """The losses, `[steps, passes]`."""
        self.course.clear()
        for step in range(start, start + steps):
            losses: list[Tensor] = []

            def compute(of: Part, step: int = step, losses: Any = losses) -> Tensor:
                images, ids = golden.batch(step, self.dtype)
                if of.task is not None:
                    images, ids = images[ids == of.task], ids[ids == of.task]
                optimizer.zero_grad()
                loss, _, _ = step_loss(self.method, self.objective, images, ids)
                loss.backward()
                losses.append(loss.detach())
                return loss

            self.update(Step(compute, optimizer.step, self.learned, len(golden.TASKS), step))
            self.course.append(losses)
        return torch.stack([torch.stack(losses) for losses in self.course])


def expert_labels(label: str, dtype: torch.dtype) -> None:
    sure = label.endswith("sure")
    method = merging(dtype)
    objective = adamerge.objectives.ExpertLabels(golden.heads(dtype), experts(dtype), sure=sure)
    course = Course(method, objective, dtype, Joint())
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    steps = len(more.expected(f"{label}/loss"))
    found = [method.coefficients.detach().clone()]
    optimizer.register_step_post_hook(lambda *_: found.append(method.coefficients.detach().clone()))
    more.agrees(course.run(optimizer, steps)[:, 0], f"{label}/loss")
    more.agrees(torch.stack(found), f"{label}/coefficients")


def sam(label: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    method = merging(dtype)
    quarter = dict.fromkeys(golden.TASKS, 0.25)  # the set's loss is without the factor 2²
    teacher = experts(dtype)
    objective = adamerge.objectives.ExpertKL(golden.heads(dtype), teacher, 2.0, quarter)
    update = Sam(0.07, adaptive=label.endswith("adaptive"))
    pushes: list[Tensor] = []
    push = Sam.push
    monkeypatch.setattr(Sam, "push", lambda *given: pushes.append(push(*given)))
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3, weight_decay=5e-4)
    found = [method.coefficients.detach().clone()]
    optimizer.register_step_post_hook(lambda *_: found.append(method.coefficients.detach().clone()))
    steps = len(more.expected(f"{label}/loss"))
    more.agrees(Course(method, objective, dtype, update).run(optimizer, steps), f"{label}/loss")
    more.agrees(torch.stack(found), f"{label}/coefficients")
    more.agrees(torch.stack(pushes), f"{label}/push")


def atlas(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given = lambda seed, task, layer, shape: more.uniform(0, layer, shape)  # noqa: E731
    monkeypatch.setattr("adamerge.transforms.draws.uniform", given)
    method = merging(dtype, granularity="partition", parts=3, init=0.0)
    sizes = [torch.bincount(own.flatten(), minlength=3) for own in method._parts.values()]
    more.agrees(torch.stack(sizes).to(dtype), "atlas/partition_sizes")
    objective = adamerge.objectives.Entropy(golden.heads(dtype))
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.01, weight_decay=0.1)
    found, norms = [method.coefficients.detach().clone()], []

    def clip(*_: Any) -> None:
        norms.append(torch.nn.utils.clip_grad_norm_(method.parameters(), 0.16))

    update = Clipped(clip)
    optimizer.register_step_post_hook(lambda *_: found.append(method.coefficients.detach().clone()))
    steps = len(more.expected("atlas/loss"))
    more.agrees(Course(method, objective, dtype, update).run(optimizer, steps)[:, 0], "atlas/loss")
    more.agrees(torch.stack(found), "atlas/coefficients")
    more.agrees(torch.stack(norms), "atlas/gradient_norm")
    check_features("atlas", method.fold(), dtype)


def symerge(dtype: torch.dtype, _: Any) -> None:
    method, heads = merging(dtype, clamp=True), LearnedHeads(golden.heads(dtype))
    objective = adamerge.objectives.ExpertLabels(heads, experts(dtype), sure=True)
    course = Course(method, objective, dtype, PerTask())
    optimizer = torch.optim.Adam(course.learned, lr=1e-2)
    found, steps = [method.coefficients.detach().clone()], len(more.expected("symerge/loss"))
    shares: list[Tensor] = []

    def used(student: Tensor, expert: Tensor, sure: bool) -> Tensor:
        shares.append(kept(student, expert).sum())
        return expert_labels_of(student, expert, sure)

    with patch("adamerge.learn.objectives.taught.expert_labels", used):
        losses = []
        for _ in range(steps):
            losses.append(course.run(optimizer, 1, start=len(losses))[0])
            found.append(method.coefficients.detach().clone())
    more.agrees(torch.stack(losses), "symerge/loss")
    more.agrees(torch.stack(found), "symerge/coefficients")
    more.agrees(torch.stack(shares).view(steps, -1).to(dtype), "symerge/used")
    own = heads.frozen()
    for task in golden.TASKS:
        more.agrees(own.weight(task), f"symerge/head/{task}")
        more.agrees(own.bias(task), f"symerge/bias/{task}")
    check_features("symerge", method.fold(), dtype)


def kept(student: Tensor, expert: Tensor) -> Tensor:
    """Which images SyMerge uses, one after the other."""
    pairs = zip(student.softmax(-1), expert.softmax(-1), strict=True)
    return torch.tensor([bool(s.argmax() == e.argmax() or e.max() >= s.max()) for s, e in pairs])


class Clipped:
    """The joint update with something done to the gradient, as Lightning clips it."""

    def __init__(self, change: Callable[[], None]) -> None:
        self.change = change

    def __call__(self, step: Step) -> None:
        def changed() -> Tensor:
            loss = step.compute(Part())
            self.change()
            return loss

        step.move(changed)


def check_features(label: str, encoder: torch.nn.Module, dtype: torch.dtype) -> None:
    """The features of every task's first batch."""
    images, ids = golden.batch(0, dtype)
    found = encoder(images, ids)
    for row, task in enumerate(golden.TASKS):
        more.agrees(found[ids == row], f"{label}/features/{task}")


CHECKS = {
    "atlas": atlas,
    "expert_labels": lambda dtype, _: expert_labels("expert_labels", dtype),
    "expert_labels_sure": lambda dtype, _: expert_labels("expert_labels_sure", dtype),
    "symerge": symerge,
    "sam": lambda dtype, patch: sam("sam", dtype, patch),
    "sam_adaptive": lambda dtype, patch: sam("sam_adaptive", dtype, patch),
}


@pytest.mark.parametrize("dtype", more.DTYPES, ids=str)
@pytest.mark.parametrize("label", CHECKS)
def test_agrees(label: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    more.run(lambda given: CHECKS[label](given, monkeypatch), label, dtype)
