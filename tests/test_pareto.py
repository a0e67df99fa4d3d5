"""Pareto: every preference has its merge, and weighs the tasks while that is learned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import adamerge
from adamerge import AdamergeError
from adamerge.learn.step import step_loss
from adamerge.methods import Pareto
from tests import golden_data as golden


def method(**settings: object) -> Pareto:
    return Pareto(golden.clip().backbone, golden.task_vectors(), **settings)  # type: ignore[arg-type]


def test_a_fold_is_the_merge_of_its_coefficients() -> None:
    ours = method()
    with torch.no_grad():
        torch.nn.init.normal_(ours.slopes, generator=torch.Generator().manual_seed(0))
    preference = [1.0, 2.0, 5.0]
    shares = torch.tensor(preference, dtype=torch.float64) / 8 - 1 / 3
    wanted = ours.coefficients + sum(ours.slopes[..., s] * shares[s] for s in range(3))
    vectors = golden.task_vectors()
    expected = vectors.combine(wanted.detach())
    found = ours.fold_at(preference).backbone.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_gradients_are_those_of_the_weighted_loss() -> None:
    ours, images, ids = method(), *golden.batch(0)
    ours.begin_step(3)
    drawn = ours._drawn.clone()
    assert drawn.sum() == pytest.approx(1) and len(drawn.unique()) == 3
    objective = adamerge.objectives.Entropy(golden.heads())
    loss, values, _ = step_loss(ours, objective, images, ids)
    loss.backward()
    table = ours.at(drawn).detach().requires_grad_()
    merge = golden.task_vectors().combine(table)
    features = ours.tower({**golden.task_vectors().constants, **merge}, images)
    plain: Tensor = objective(features, ids)
    torch.testing.assert_close(values, plain.detach())
    (plain @ (3 * drawn)).backward()
    assert table.grad is not None
    torch.testing.assert_close(ours.coefficients.grad, table.grad)
    torch.testing.assert_close(ours.slopes.grad, table.grad[..., None] * (drawn - 1 / 3))


def test_a_preference_depends_on_the_step_alone_and_ends_with_learning() -> None:
    one, other = method(), method(seed=1)
    drawn = []
    for which, step in ((one, 0), (one, 1), (one, 0), (other, 0)):
        which.begin_step(step)
        drawn.append(which._drawn.clone())
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[3])
    images, ids = golden.batch(0)
    task_batches = {t: [images[ids == row]] for row, t in enumerate(golden.TASKS)}
    adamerge.adapt(one, task_batches, heads=golden.heads(), steps=3, lr=0.1)
    torch.testing.assert_close(one.fold()(images, ids), one(images, ids))


@pytest.mark.parametrize(
    "preference",
    [
        [1.0],
        [0.0, 0.0, 0.0],
        [1.0, -1.0, 1.0],
        {"task_x": 1.0},
        [1.0, 1.0, "a"],
        5,
        {1: 2, "q": 1},
        dict.fromkeys(golden.TASKS, 1e308),
        [float("nan"), 1.0, 1.0],
    ],
)
def test_refused_preferences(preference: object) -> None:
    with pytest.raises(AdamergeError, match="expected a number of 0 or more for each of task_a"):
        method(preference=preference)
    with pytest.raises(AdamergeError, match="expected a number of 0 or more for each of task_a"):
        method().fold_at(preference)  # type: ignore[arg-type]


def test_init_is_a_number() -> None:
    with pytest.raises(AdamergeError, match="Pareto: init is nan, expected a number"):
        method(init=float("nan"))
