"""Merges by statistics of unlabeled images give the second set's reference numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from adamerge import TaskVectors, transforms
from adamerge.encoders import Experts, Tower, merged_encoder
from adamerge.encoders.gradients import Gradients, Kind
from adamerge.encoders.statistics import Inputs, gather_inputs
from adamerge.methods import FeatCal, ProDistill, RegMeanPP
from adamerge.methods.calibration.base import Calibration
from adamerge.transforms.gradients import task_weights
from tests import golden_data as golden
from tests import golden_more_data as more


def images(dtype: torch.dtype, batches: int = 4) -> dict[str, list[Tensor]]:
    """The first batches of every task."""
    return {
        task: [golden.tensors("images")[task][step].to(dtype) for step in range(batches)]
        for task in golden.TASKS
    }


def experts(dtype: torch.dtype) -> Experts:
    return Experts(golden.clip().backbone, golden.task_vectors(dtype))


@functools.cache
def inputs(dtype: torch.dtype) -> Inputs:
    return gather_inputs(experts(dtype), images(dtype))


@functools.cache
def gradients(dtype: torch.dtype) -> Gradients:
    return Gradients(experts(dtype), golden.heads(dtype), images(dtype, 1))


def regmean(dtype: torch.dtype) -> None:
    grams = {name: inputs(dtype)[name].gram.to(dtype) for name in more.lists("linears")}
    assert set(grams) == set(inputs(dtype))
    prints = [[more.fingerprint(gram[t]) for gram in grams.values()] for t in tasks()]
    more.agrees(stack(prints), "regmean/gram/fingerprint")
    for key in more.numbers():
        name = key.removeprefix("regmean/gram/full/")
        if name in grams:
            more.agrees(grams[name], key)
    found = transforms.regmean(golden.task_vectors(dtype), inputs(dtype))
    more.check_merge("regmean", found)
    more.check_layers_per_task("regmean/share", more.per_task(found))


def regmean_full(dtype: torch.dtype) -> None:
    found = transforms.regmean(golden.task_vectors(dtype), inputs(dtype), off_diagonal=1.0)
    more.check_merge("regmean_full", found)


def fisher(
    label: str, kind: Kind, merge: Callable[[TaskVectors, Gradients], TaskVectors]
) -> more.Check:
    def check(dtype: torch.dtype) -> None:
        squares = gradients(dtype).squared(kind)
        more.check_layers_per_task(f"{label}/fisher", squares)
        more.agrees(task_weights(squares, 1e-6).to(dtype), f"{label}/weight")
        found = merge(golden.task_vectors(dtype), gradients(dtype))
        more.check_merge(label, found)
        if label == "fisher_exact":
            more.check_layers_per_task(f"{label}/share", more.per_task(found))

    return check


def fisher_exact_unnormalised(dtype: torch.dtype) -> None:
    found = transforms.fisher(golden.task_vectors(dtype), gradients(dtype), normalised=False)
    more.check_merge("fisher_exact_unnormalised", found)


def calibration(label: str, make: Callable[[Experts], Calibration]) -> more.Check:
    def check(dtype: torch.dtype) -> None:
        encoder = make(experts(dtype)).fold()
        weights, start = encoder.backbone.state_dict(), golden.state("pretrained", dtype)
        more.check_layers(label, {name: weights[name] - start[name] for name in start})
        for task, batches in images(dtype, 1).items():
            more.agrees(encoder(batches[0]).detach(), f"{label}/features/{task}")

    return check


def merge_of(teacher: Experts, coefficient: float) -> torch.nn.Module:
    return merged_encoder(Tower(golden.clip().backbone), teacher.task_vectors, coefficient)


def featcal(teacher: Experts) -> Calibration:
    dtype = more.vectors_dtype(teacher.task_vectors)
    return FeatCal(merge_of(teacher, 0.3), teacher, images(dtype))


def regmean_pp(teacher: Experts) -> Calibration:
    dtype = more.vectors_dtype(teacher.task_vectors)
    return RegMeanPP(merge_of(teacher, 1 / len(golden.TASKS)), teacher, images(dtype))


def prodistill(dtype: torch.dtype) -> None:
    """The method starts from the merge, the set from coefficients of 0.3: the same.

    In float32 Adam moves key biases, which change nothing, by the rounding of their gradient.
    """
    bound = 1e-3 if dtype == torch.float32 else None
    teacher = experts(dtype)
    steps = more.expected("prodistill/loss").shape[1]
    method = ProDistill(merge_of(teacher, 0.3), teacher, images(dtype, 1), epochs=steps)
    found: list[Tensor] = []

    def kept(index: int, *given: Any) -> tuple[dict[str, Tensor], list[float]]:
        learned, losses = learn(index, *given)
        key, used = f"prodistill/alpha/{index}", {n: a + 0.3 for n, a in learned.items()}
        prints = [[more.fingerprint(alpha[t]) for alpha in used.values()] for t in tasks()]
        more.agrees(stack(prints), f"{key}/fingerprint", bound)
        for name in used.keys() & set(more.lists("full")):
            if f"{key}/full/{name}" in more.numbers():
                more.agrees(used[name], f"{key}/full/{name}", bound)
        found.append(torch.tensor(losses, dtype=dtype))
        return learned, losses

    learn = method._learn
    with patch.object(method, "_learn", kept):
        calibration("prodistill", lambda _: method)(dtype)
    more.agrees(torch.stack(found), "prodistill/loss")


def tasks() -> range:
    return range(len(golden.TASKS))


def stack(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row) for row in rows])


CHECKS: dict[str, more.Check] = {
    "featcal": calibration("featcal", featcal),
    "fisher_batch_sum": fisher("fisher_batch_sum", "batch_sum", transforms.fisher_batch_sum),
    "fisher_exact": fisher("fisher_exact", "all", transforms.fisher),
    "fisher_exact_unnormalised": fisher_exact_unnormalised,
    "fisher_predicted": fisher(
        "fisher_predicted", "predicted", lambda tv, found: transforms.fisher(tv, found, "predicted")
    ),
    "prodistill": prodistill,
    "regmean": regmean,
    "regmean_full": regmean_full,
    "regmean_pp": calibration("regmean_pp", regmean_pp),
}


@pytest.mark.parametrize("dtype", more.DTYPES, ids=str)
@pytest.mark.parametrize("label", CHECKS)
def test_agrees(label: str, dtype: torch.dtype) -> None:
    more.run(CHECKS[label], label, dtype)
