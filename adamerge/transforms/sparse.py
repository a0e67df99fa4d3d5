"""Transforms that keep a part of each task vector's entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.transforms.draws import uniform
from adamerge.transforms.layers import check_number, each_layer
from adamerge.weights.task_vectors import TaskVectors


def ties(
    task_vectors: TaskVectors,
    density: float | Mapping[str, float] = 0.2,
    architecture: Sequence[str] = (),
) -> TaskVectors:
    """Trim and sign-elected task vectors, one per task: the "++" of AdaMerging++.

    TIES-Merging: Resolving Interference When Merging Models (arXiv 2306.01708), without its last
    sum. Per expert, over its whole vector of P entries, keep those at or above the magnitude that
    `P − floor(density · P)` entries do not exceed; elect a sign per entry from the sum of the
    trimmed vectors (a zero sum takes the sign of the sum of all elected signs); drop the entries
    that disagree.

    Args:
        task_vectors: the experts' task vectors; left unchanged.
        density: fraction of entries to keep before the election, in (0, 1]; or one for every
            open_clip name of an architecture, and a `default`.
        architecture: the names that the task vectors' architecture has in open_clip.

    Raises:
        AdamergeError: `density` is out of range, or there is none for this architecture.
    """
    density = _of_architecture(density, architecture)
    check_number("ties", "density", density, 0, 1, open_low=True)
    thresholds = _trim_thresholds(task_vectors, density)
    signs = {name: trimmed.sum(0).sign_() for name, trimmed in _trimmed(task_vectors, thresholds)}
    balance = torch.stack([sign.sum(dtype=torch.float64) for sign in signs.values()]).sum().sign()
    return task_vectors.with_deltas(_agreeing(task_vectors, thresholds, signs, balance))


def _of_architecture(density: float | Mapping[str, float], names: Sequence[str]) -> float:
    if not isinstance(density, Mapping):
        return density
    named = [name for name in (*names, "default") if name in density]
    if not named or not isinstance(density[named[0]], int | float):
        raise AdamergeError(
            f"ties: density is {dict(density)!r}, expected a number for "
            f"{names[0] if names else 'this architecture'} or for default"
        )
    return float(density[named[0]])


def _trim_thresholds(task_vectors: TaskVectors, density: float) -> Tensor:
    """The smallest magnitude each task keeps, `[T]`; one task's magnitudes in memory at a time."""
    total = task_vectors.numel()
    rank = max(1, total - int(density * total))
    thresholds = []
    for row in range(len(task_vectors.tasks)):
        parts = ((task_vectors.layers[n], base) for n, base in task_vectors.pretrained.items())
        vector = torch.cat([layer.row(row, base).flatten() for layer, base in parts])
        thresholds.append(vector.abs_().kthvalue(rank).values)
    return torch.stack(thresholds)


def _trimmed(task_vectors: TaskVectors, thresholds: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every layer in turn, `[T, *shape]`: made twice, so that one is in memory at a time."""
    for name, delta in task_vectors.deltas.items():
        yield name, _trim(delta, thresholds)


def _agreeing(
    task_vectors: TaskVectors, thresholds: Tensor, signs: dict[str, Tensor], balance: Tensor
) -> Iterator[tuple[str, Tensor]]:
    for name, trimmed in _trimmed(task_vectors, thresholds):
        sign = torch.where(signs[name] == 0, balance.to(signs[name].dtype), signs[name])
        yield name, trimmed.mul_(trimmed.sign() == sign)


def _trim(delta: Tensor, thresholds: Tensor) -> Tensor:
    per_task = thresholds.view(-1, *[1] * (delta.ndim - 1))
    return delta * (delta.abs() >= per_task)


def magnitude(task_vectors: TaskVectors, density: float = 0.2) -> TaskVectors:
    """The largest entries of each layer: `τ_t · 1[|τ_t| is among the int(density · n) largest]`.

    Magnitude pruning, as in Learning both Weights and Connections for Efficient Neural Networks
    (arXiv 1506.02626), of task vectors. Every layer of n entries keeps at least one; of equal
    magnitudes the earlier entry comes first. The vectors are cleaned, not merged: init 0.3.

    Args:
        task_vectors: left unchanged; all layers take part.
        density: fraction of entries to keep, in (0, 1].

    Raises:
        AdamergeError: `density` is out of range.
    """
    check_number("magnitude", "density", density, 0, 1, open_low=True)

    def change(_: str, tau: Tensor) -> Tensor:
        count = max(1, int(density * tau[0].numel()))
        return _band(tau, tau[0].numel(), 0, count)

    return each_layer(task_vectors, change)


def dare(task_vectors: TaskVectors, density: float = 0.5, seed: int = 0) -> TaskVectors:
    """A random part of each task vector, scaled up: `τ_t · 1[u ≥ 1 − density] / density`.

    DARE of Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
    Lunch (arXiv 2311.03099); u is uniform in [0, 1) for every entry, and the drop rate of the paper
    is `1 − density`. The vectors are cleaned, not merged: init 0.3.

    Args:
        task_vectors: left unchanged; all layers take part.
        density: share of entries to keep, in (0, 1].
        seed: of what is drawn; the same on every device.

    Raises:
        AdamergeError: `density` is out of range.
    """
    check_number("dare", "density", density, 0, 1, open_low=True)

    def change(name: str, tau: Tensor) -> Tensor:
        changed = torch.empty_like(tau)
        for row, task in enumerate(task_vectors.tasks):
            kept = uniform(seed, task, name, tau.shape[1:]) >= 1 - density
            changed[row] = tau[row] * kept.to(tau.device) / density
        return changed

    return each_layer(task_vectors, change)


def della(
    task_vectors: TaskVectors, density: float = 0.5, epsilon: float = 0.15, seed: int = 0
) -> TaskVectors:
    """A random part of each task vector, large entries more often: `τ_t · 1[u < p] / p`.

    The first step of DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based
    Sampling (arXiv 2406.11617); `elect` after it is the others. In a row of d entries (an index of
    the first dimension; a vector is one row), `p = density − epsilon + 2 epsilon · rank / (d − 1)`,
    with rank 0 for the smallest magnitude. The vectors are cleaned, not merged: init 0.3.

    Args:
        task_vectors: left unchanged; all layers take part.
        density: mean share of entries to keep.
        epsilon: how far the probabilities of a row lie from it: `density ± epsilon` in (0, 1].
        seed: of what is drawn; the same on every device.

    Raises:
        AdamergeError: a probability would be out of range.
    """
    check_number("della", "density", density, 0, 1, open_low=True)
    check_number("della", "epsilon", epsilon, 0, 1)
    if not (density - epsilon > 0 and density + epsilon <= 1):
        raise AdamergeError(
            f"della: density ± epsilon is {density - epsilon:g} to {density + epsilon:g}, expected "
            "probabilities in (0, 1]: choose a smaller epsilon"
        )

    def change(name: str, tau: Tensor) -> Tensor:
        changed = torch.empty_like(tau)
        for row, task in enumerate(task_vectors.tasks):
            chance = keep_probability(tau[row], density, epsilon)
            kept = uniform(seed, task, name, tau.shape[1:]).to(tau.device) < chance
            changed[row] = tau[row] * kept / chance
        return changed

    return each_layer(task_vectors, change)


def keep_probability(tau: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA's p of every entry of one task's layer, `[*shape] -> [*shape]`; of equal magnitudes the
    earlier one in its row ranks as smaller."""
    rows = tau.abs().reshape(len(tau) if tau.ndim > 1 else 1, -1)
    width = rows.shape[1]
    if width < 2:
        return torch.full_like(tau, density)
    order = rows.argsort(dim=1, stable=True)
    ranks = torch.empty_like(rows)
    steps = torch.arange(width, dtype=rows.dtype, device=rows.device)
    ranks.scatter_(1, order, steps.expand_as(rows))
    return (ranks.mul_(2 * epsilon / (width - 1)) + (density - epsilon)).view(tau.shape)


def breadcrumbs(
    task_vectors: TaskVectors, density: float = 0.2, largest: float = 0.1, rows: bool = False
) -> TaskVectors:
    """Neither the largest nor the small entries: the next `int(density · n)` magnitudes after the
    `int(largest · n)` largest, which are dropped.

    Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks (arXiv 2312.06795). Of
    equal magnitudes the earlier entry comes first. The vectors are cleaned, not merged: init 0.3.

    Args:
        task_vectors: left unchanged; all layers take part.
        density: fraction of entries to keep, in (0, 1].
        largest: fraction of entries, the largest in magnitude, to drop: at most `1 − density`.
        rows: choose in every row of the last dimension (as the authors' code does), not in every
            layer.

    Raises:
        AdamergeError: a fraction is out of range.
    """
    check_number("breadcrumbs", "density", density, 0, 1, open_low=True)
    check_number("breadcrumbs", "largest", largest, 0, 1)
    if density + largest > 1:
        raise AdamergeError(
            f"breadcrumbs: density {density:g} and largest {largest:g} are more than all entries: "
            "expected a sum of at most 1"
        )

    def change(_: str, tau: Tensor) -> Tensor:
        width = tau.shape[-1] if rows and tau.ndim > 1 else tau[0].numel()
        return _band(tau, width, int(width * largest), int(width * density))

    return each_layer(task_vectors, change)


def _band(tau: Tensor, width: int, dropped: int, kept: int) -> Tensor:
    """τ `[T, *shape]` with, in every row of `width` entries, the `kept` largest magnitudes after
    the `dropped` largest, and 0 elsewhere; a task at a time."""
    changed = torch.empty_like(tau, memory_format=torch.contiguous_format)
    for row in range(len(tau)):
        sizes = tau[row].reshape(-1, width).abs()
        band = _largest(sizes, dropped + kept) & ~_largest(sizes, dropped)
        torch.mul(tau[row], band.view(tau[row].shape), out=changed[row])
    return changed


def _largest(sizes: Tensor, count: int) -> Tensor:
    """Where the `count` largest of every row are, `[rows, width]`; of equal ones the earlier."""
    if count == 0 or count == sizes.shape[1]:
        return torch.full_like(sizes, count > 0, dtype=torch.bool)
    edge = sizes.kthvalue(sizes.shape[1] - count + 1, dim=1, keepdim=True).values
    above, equal = sizes > edge, sizes == edge
    missing = count - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= missing))
