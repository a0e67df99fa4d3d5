"""The public classes give the reference numbers: coefficients, losses, features, ties vectors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import adamerge
from adamerge.learn.step import step_loss
from tests import golden_data as golden

RUNS: dict[str, dict[str, Any]] = {
    "layer_wise": {"granularity": "layer"},
    "layer_wise_clamped": {"granularity": "layer", "clamp": True},
    "layer_wise_clamp_hit": {"granularity": "layer", "clamp": True, "init": 0.05, "lr": 0.1},
    "task_wise": {"granularity": "task"},
    "layer_wise_pp": {"granularity": "layer", "pp": True},
    "task_wise_pp": {"granularity": "task", "pp": True},
}


def adapt(run: str, dtype: torch.dtype, micro_batch: int | None) -> dict[str, Any]:
    options = dict(RUNS[run])
    rate, pp = options.pop("lr", 1e-2), options.pop("pp", False)
    vectors = golden.task_vectors(dtype)
    if pp:
        vectors = adamerge.transforms.ties(vectors, density=0.2)
    method = adamerge.methods.AdaMerging(golden.clip().backbone, vectors, **options)
    objective = adamerge.objectives.Entropy(golden.heads(dtype))
    optimizer = torch.optim.Adam(method.parameters(), lr=rate)
    course, losses = [method.coefficients.detach().clone()], []
    for step in range(20):
        images, ids = golden.batch(step, dtype)
        optimizer.zero_grad()
        loss, _, _ = step_loss(method, objective, images, ids, micro_batch)
        loss.backward()
        optimizer.step()
        course.append(method.coefficients.detach().clone())
        losses.append(loss.detach().double())
    coefficients = torch.stack(course).double()
    encoder = method.fold()
    return {
        "coefficients": coefficients[..., None] if coefficients.ndim == 2 else coefficients,
        "loss": torch.stack(losses),
        **{
            f"features/{task}": encoder(golden.tensors("images")[task][0].to(dtype)).double()
            for task in golden.TASKS
        },
    }


ALONE = [("layer_wise", 1), ("task_wise_pp", 1)]  # an image at a time, which is slow


@pytest.mark.parametrize(("run", "micro_batch"), [*itertools.product(RUNS, (None, 5)), *ALONE])
def test_float64_agrees_to_1e_9(run: str, micro_batch: int | None) -> None:
    found = adapt(run, torch.float64, micro_batch)
    expected = golden.tensors("expected")
    keys = [key for key in found if f"{run}/{key}" in expected]
    assert {"coefficients", "loss"} <= set(keys)
    for key in keys:
        torch.testing.assert_close(found[key], expected[f"{run}/{key}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("run", "micro_batch"), [*((run, None) for run in RUNS), *ALONE])
def test_float32_agrees_within_the_bounds_of_the_reference(
    run: str, micro_batch: int | None
) -> None:
    found = adapt(run, torch.float32, micro_batch)
    expected = golden.tensors("expected")
    wanted = expected[f"{run}/coefficients"]
    # A coefficient whose gradient is exactly zero (a bias of the attention keys alone) does not
    # move in float64, while in float32 Adam scales up its rounding errors: in any implementation.
    moved = (wanted - wanted[0]).abs().amax(0) > 1e-9
    bound = 1e-3 if run == "layer_wise_clamp_hit" else 1e-5
    off = (found["coefficients"] - wanted).abs().amax(0)
    assert off[moved].max() <= bound
    assert (off > bound).sum() <= (run == "layer_wise_pp") and off.max() <= 1e-3
    torch.testing.assert_close(found["loss"], expected[f"{run}/loss"], rtol=1e-5, atol=1e-5)
    for key in (k for k in found if k.startswith("features") and f"{run}/{k}" in expected):
        reference = expected[f"{run}/{key}"]
        assert (found[key] - reference).norm() / reference.norm() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ties_vectors(dtype: torch.dtype) -> None:
    found = adamerge.transforms.ties(golden.task_vectors(dtype), density=0.2)
    expected = golden.tensors("expected_ties_vectors")
    for name in found.names:
        for row, task in enumerate(found.tasks):
            torch.testing.assert_close(
                found.deltas[name][row].double(),
                expected[f"{task}/{name}"].double(),
                rtol=0,
                atol=1e-9 if dtype == torch.float64 else 1e-7,
            )
