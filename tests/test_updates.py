"""Updates against plain loops, in `adamerge.adapt`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adamerge
from adamerge import AdamergeError, objectives
from adamerge.learn.updates import Bilevel, Part, PerTask, Progressive, Sam, Step, update_of
from tests import golden_data as golden


class Teacher:
    """Says of every image what it is told to."""

    widths = ()

    def __call__(self, images: Tensor, task_ids: Tensor) -> Tensor:
        return images * torch.tensor([3.0, -1.0, 2.0, 0.5])

    trace = __call__


HEADS = {"a": nn.Identity(), "b": nn.Identity()}


def batches() -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {task: [torch.randn(6, 4, generator=generator) for _ in range(3)] for task in HEADS}


def method(init: float = 0.3) -> adamerge.methods.AdaMerging:
    torch.manual_seed(1)
    network, a, b = (nn.Linear(4, 4) for _ in range(3))
    vectors = adamerge.TaskVectors(network, {"a": a, "b": b})
    return adamerge.methods.AdaMerging(network, vectors, init=init)


def loss(coefficients: Tensor, task: str, images: Tensor, row: int) -> Tensor:
    """The entropy of one task's images at merging coefficients `[T, L]`."""
    vectors = method().task_vectors
    weight, bias = (
        vectors.pretrained[n] + torch.einsum("t,t...->...", coefficients[:, i], vectors.deltas[n])
        for i, n in enumerate(vectors.names)
    )
    return objectives.entropy(images @ weight.T + bias)


def test_per_task_moves_once_for_every_task() -> None:
    ours, plain = method(), nn.Parameter(method().coefficients.detach().clone())
    given = batches()
    course = adamerge.adapt(ours, given, steps=3, lr=0.1, update="per_task")
    optimizer, wanted = torch.optim.Adam([plain], lr=0.1), []
    for step in range(3):
        for row, task in enumerate(HEADS):
            optimizer.zero_grad()
            found = loss(plain, task, given[task][step], row)
            found.backward()
            optimizer.step()
            wanted.append(found.detach())
    torch.testing.assert_close(ours.coefficients, plain)
    torch.testing.assert_close(course, torch.stack(wanted).view(3, 2))


def test_a_shuffled_order_depends_on_seed_and_step_alone() -> None:
    def orders(seed: int) -> list[list[int]]:
        seen: list[list[int]] = []

        def compute(part: Part) -> Tensor:
            seen[-1].append(part.task)
            return torch.zeros(())

        for step in range(8):
            seen.append([])
            PerTask("shuffled", seed)(Step(compute, lambda closure: closure(), [], 5, step))
        return seen

    assert orders(0) == orders(0) and orders(0) != orders(1)
    assert all(sorted(order) == list(range(5)) for order in orders(0))
    assert len({tuple(order) for order in orders(0)}) > 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_moves_by_the_gradient_at_the_push(adaptive: bool) -> None:
    ours, plain = method(), nn.Parameter(method().coefficients.detach().clone())
    given = batches()
    rule = Sam(0.2, adaptive)
    adamerge.adapt(ours, given, steps=2, lr=0.1, update=rule, optimizer=torch.optim.SGD)
    for step in range(2):
        start = plain.detach().clone()
        for again in (False, True):
            plain.grad = None
            total = sum(loss(plain, t, given[t][step], r) for r, t in enumerate(HEADS))
            assert isinstance(total, Tensor)
            total.backward()
            assert plain.grad is not None
            size = start.abs() if adaptive else torch.ones_like(start)
            with torch.no_grad():
                push = 0.2 * size**2 * plain.grad / (size * plain.grad).norm()
                plain.copy_(start - 0.1 * plain.grad if again else start + push)
    torch.testing.assert_close(ours.coefficients, plain)


def test_the_adaptive_push_is_nothing_where_all_is_0() -> None:
    runs = []
    for update in (Sam(0.5, adaptive=True), "joint"):
        learned = method(init=0.0)
        adamerge.adapt(learned, batches(), steps=1, lr=0.1, update=update)
        runs.append(learned.coefficients.detach())
    assert torch.equal(*runs)


class TwoLevels(adamerge.methods.MergeMethod):
    """One coefficient a task, the first of them below the others."""

    def __init__(self, network: nn.Module, vectors: adamerge.TaskVectors) -> None:
        super().__init__(network, vectors)
        self.first, self.second = (nn.Parameter(torch.tensor([0.3])) for _ in range(2))

    @property
    def below(self) -> list[nn.Parameter]:
        return [self.first]

    def weights(self) -> dict[str, Tensor]:
        return self.task_vectors.combine(torch.cat([self.first, self.second]))


def test_bilevel_moves_by_the_gradient_after_a_step_below() -> None:
    one = method()
    ours, given = TwoLevels(nn.Linear(4, 4), one.task_vectors), batches()
    adamerge.adapt(ours, given, steps=3, lr=0.1, update=Bilevel(inner_lr=0.7))
    first, second = torch.tensor([0.3]), nn.Parameter(torch.tensor([0.3]))
    optimizer = torch.optim.Adam([second], lr=0.1)

    def total(below: Tensor, step: int, half: int) -> Tensor:
        table = torch.cat([below, second])[:, None].expand(2, 2)
        return sum(loss(table, t, given[t][step][half::2], r) for r, t in enumerate(HEADS))

    for step in range(3):
        below = first.clone().requires_grad_()
        (slope,) = torch.autograd.grad(total(below, step, 0), below)
        optimizer.zero_grad()
        total(first - 0.7 * slope, step, 1).backward()
        optimizer.step()
    assert torch.equal(ours.first, first), "what is below begins anew at every step"
    torch.testing.assert_close(ours.second, second)


def test_batches_without_what_an_update_asks_for_are_refused() -> None:
    two = TwoLevels(nn.Linear(4, 4), method().task_vectors)
    single = {task: [inputs[0][:1]] for task, inputs in batches().items()}
    with pytest.raises(AdamergeError, match="halves every task's images, and a batch has 1 of"):
        adamerge.adapt(two, single, steps=1, update="bilevel")
    of_a = [(batches()["a"][0], torch.zeros(6, dtype=torch.long))]
    with pytest.raises(AdamergeError, match="a batch has none with the task id 1: give some"):
        adamerge.adapt(method(), of_a, heads=HEADS, steps=1, update="per_task")


def test_progressive_learns_one_block_after_the_other() -> None:
    torch.manual_seed(1)
    network, a, b = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
    vectors = adamerge.TaskVectors(network, {"a": a, "b": b})
    ours, plain = (adamerge.methods.AdaMerging(network, vectors) for _ in range(2))
    given, kept = batches(), torch.zeros(2, 4)
    momentum = functools.partial(torch.optim.SGD, momentum=0.9)
    update = Progressive(inner_steps=2)
    adamerge.adapt(ours, given, steps=5, lr=0.1, update=update, optimizer=momentum)
    for step in range(5):
        plain.zero_grad()
        for row, task in enumerate(HEADS):
            images = given[task][step % 3]
            objectives.entropy(plain(images, torch.full((6,), row))).backward()
        assert plain.coefficients.grad is not None
        block = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]][step // 2])
        kept = 0.9 * kept + plain.coefficients.grad * block
        with torch.no_grad():
            plain.coefficients -= 0.1 * kept * block
    torch.testing.assert_close(ours.coefficients, plain.coefficients)
    with pytest.raises(AdamergeError, match="merges no layers with numbers in their names"):
        adamerge.adapt(method(), batches(), steps=1, update="progressive")


def test_a_failed_task_is_named_and_the_step_too() -> None:
    given = batches()
    given["b"][1] = torch.full((6, 4), torch.nan)
    with pytest.raises(AdamergeError, match="loss of task b became NaN or infinite at step 1"):
        adamerge.adapt(method(), given, steps=3, update="per_task")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "both"}, "update.name is 'both': expected joint"),
        ({"name": "per_task", "order": "random"}, "update.order is 'random'"),
        ({"name": "sam", "rho": 0.0}, "update.rho is 0.0: expected a finite number > 0"),
        ({"name": "bilevel", "inner_lr": -1}, "update.inner_lr is -1: expected a finite number"),
        ({"name": "sam", "rho": "abc"}, "update.rho is 'abc': expected a finite number > 0"),
        ({"name": "sam", "rho": None}, "update.rho is None: expected a finite number > 0"),
        ({"name": "sam", "roh": 0.1}, r"update.roh is unknown \(did you mean 'rho'\?\)"),
        ({"name": "sam", "adaptive": "no"}, "update.adaptive is 'no': expected true or false"),
        ({"name": "progressive", "inner_steps": 0.5}, "update.inner_steps is 0.5: expected a wh"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdamergeError, match=message):
        update_of(settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerTask("shuffle"), "update.order is 'shuffle': expected 'fixed'"),  # type: ignore[arg-type]
        (lambda: Sam(rho=-1), "update.rho is -1: expected a finite number > 0"),
        (lambda: Bilevel(-1), "update.inner_lr is -1: expected"),
        (lambda: Bilevel(float("nan")), "update.inner_lr is nan: expected"),
        (lambda: Progressive(0), "update.inner_steps is 0: expected a whole number, at least 1"),
        (lambda: Progressive(-3), "update.inner_steps is -3: expected"),
    ],
)
def test_refused_updates(make: Callable[[], object], message: str) -> None:
    with pytest.raises(AdamergeError, match=message):
        make()


def test_sure_labels_of_nothing_kept_are_0_with_gradient_0() -> None:
    logits = torch.tensor([[0.0, 9.0, 0.0]], requires_grad=True)
    expert = torch.tensor([[0.2, 0.1, 0.0]])
    found = objectives.expert_labels(logits, expert, sure=True)
    found.backward()
    assert found == 0 and torch.equal(logits.grad, torch.zeros(1, 3))
    assert objectives.expert_labels(logits, expert) > 1


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_features(norm: str) -> None:
    images, ids = golden.batch(0)
    given = images.flatten(1)[:, :4].float()
    objective = objectives.ExpertFeatures(HEADS, Teacher(), norm)
    ids = ids.clamp_max(1)
    values = objective(given, ids, targets=objective.targets(given, ids))
    off = given - Teacher()(given, ids)
    each = off.abs() if norm == "l1" else off.square()
    for task in (0, 1):
        torch.testing.assert_close(values[task], each[ids == task].mean())
    with pytest.raises(AdamergeError, match=r"objective\.norm is 'l3': expected 'l1' or 'l2'"):
        objectives.ExpertFeatures(HEADS, Teacher(), "l3")


def test_mixed_goes_from_one_to_the_other() -> None:
    objective = objectives.Mixed(HEADS, Teacher(), "expert_kl", "entropy", steps=4)
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    targets = objective.targets(features, ids)
    ends = [
        objectives.ExpertKL(HEADS, Teacher())(features, ids, targets=targets),
        objectives.Entropy(HEADS)(features, ids),
    ]
    for step, share in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        objective.begin_step(step)
        found = objective(features, ids, targets=targets)
        torch.testing.assert_close(found, (1 - share) * ends[0] + share * ends[1])
    with pytest.raises(AdamergeError, match=r"objective\.then is 'labels': expected entropy, "):
        objectives.Mixed(HEADS, Teacher(), then="labels")
    with pytest.raises(AdamergeError, match=r"objective\.steps is 0: expected at least 1"):
        objectives.Mixed(HEADS, Teacher(), steps=0)
