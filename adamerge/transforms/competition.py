"""PCB-Merging: entries weighed by how large they are and how well they agree with other tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.transforms.layers import each_layer, spread
from adamerge.weights.task_vectors import TaskVectors


@dataclass(frozen=True)
class _Formula:
    low: float  # share of magnitudes that are clamped from below
    high: float  # share after which they are clamped from above
    dropped: float  # share of scores that count nothing
    pairwise: bool  # agreement task by task, of sizes in [0, 1]; else with the sum of all


_FORMULAS = {
    "vision": _Formula(0.01, 0.99, 0.95, pairwise=True),
    "readme": _Formula(0.0001, 0.9999, 0.9, pairwise=False),
}


def pcb(task_vectors: TaskVectors, formula: Literal["vision", "readme"] = "vision") -> TaskVectors:
    """Task vectors weighed entry by entry by their scores: `s_t c_t / max(Σ_k s_k, 1e-12)`.

    Parameter Competition Balancing for Model Merging (arXiv 2410.02396). Over the whole vector of a
    task, c is τ with its magnitudes clamped to the 1 % and 99 % quantiles, n its sign times its
    magnitude scaled to [0, 1]; its score is `exp(T n²) · Σ_k tanh(n_t n_k)`, scaled to [0, 1] from
    the 95 % quantile on and 0 below. The vectors' sum at 1 is a merge that the authors scale by
    about 1.2: init 1.2. All layers take part.

    Args:
        task_vectors: left unchanged. They are read T + 2 times; one task's vector is in memory.
        formula: `vision`, that of the authors' vision code; or `readme`, that of their repository's
            front page: quantiles 0.01 %, 99.99 % and 90 %, and `tanh(τ_t Σ_k τ_k)` in the score.

    Raises:
        AdamergeError: an unknown formula, or a task whose magnitudes are nearly all equal.
    """
    if formula not in _FORMULAS:
        raise AdamergeError(f"pcb: formula is {formula!r}, expected one of {', '.join(_FORMULAS)}")
    how = _FORMULAS[formula]
    bounds = _bounds(task_vectors, how)
    tasks, entries = range(len(task_vectors.tasks)), task_vectors.numel()
    least, most = torch.zeros(2, len(tasks), dtype=torch.float64)
    for row in tasks:
        scores = torch.cat(list(_scores_of(task_vectors, bounds, how, row)))
        most[row] = scores.max()
        least[row] = scores.kthvalue(int(entries * how.dropped) + 1).values
    span = (most - least).clamp_min(torch.finfo(torch.float32).tiny)

    def change(_: str, tau: Tensor) -> Tensor:
        clamped, sizes = _clamped(tau, bounds)
        scores = torch.stack([_score(tau, sizes, how, row) for row in tasks])
        weights = ((scores - spread(least, tau)) / spread(span, tau)).clamp_min_(0)
        return weights * clamped / weights.sum(0).clamp_min(1e-12)

    return each_layer(task_vectors, change)


def _bounds(task_vectors: TaskVectors, how: _Formula) -> Tensor:
    """The magnitudes that those of each task are clamped to, `[2, T]`."""
    entries = task_vectors.numel()
    places = (int(entries * how.low), max(0, int(entries * how.high - 1)))
    found = torch.zeros(2, len(task_vectors.tasks), dtype=torch.float64)
    for row, task in enumerate(task_vectors.tasks):
        layers = ((task_vectors.layers[n], t) for n, t in task_vectors.pretrained.items())
        vector = torch.cat([layer.row(row, base).flatten() for layer, base in layers]).abs_()
        for side, place in enumerate(places):
            found[side, row] = vector.kthvalue(place + 1).values
        if not found[1, row] > found[0, row]:
            raise AdamergeError(
                f"pcb: nearly all entries of task {task!r}'s vector have the same magnitude "
                f"({found[0, row]:g}), which leaves nothing to compare: use another transform"
            )
    return found


def _clamped(tau: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """c, and n, `[T, *shape]` each."""
    low, high = (spread(bound, tau) for bound in bounds)
    magnitudes, signs = tau.abs().clamp(low, high), tau.sign()
    return signs * magnitudes, signs * ((magnitudes - low) / (high - low))


def _scores_of(
    task_vectors: TaskVectors, bounds: Tensor, how: _Formula, row: int
) -> Iterator[Tensor]:
    """One task's scores, layer by layer, flattened."""
    for tau in task_vectors.deltas.values():
        yield _score(tau, _clamped(tau, bounds)[1], how, row).flatten()


def _score(tau: Tensor, sizes: Tensor, how: _Formula, row: int) -> Tensor:
    """Scores of one task's entries, divided by exp(T) so that many tasks do not overflow."""
    own = torch.exp(len(tau) * (sizes[row].square() - 1))
    if not how.pairwise:
        return own * torch.tanh(tau[row] * tau.sum(0))
    agreement, each = torch.zeros_like(own), torch.empty_like(own)
    for other in sizes:
        agreement += torch.mul(sizes[row], other, out=each).tanh_()
    return own.mul_(agreement)
