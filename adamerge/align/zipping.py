"""Merging of the features of two networks, within each and across, up to a chosen layer.

ZipIt! Merging Models from Different Tasks without Training (arXiv 2305.03053).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.align.symmetry import Place, Spec, State, carry
from adamerge.align.units import evaluating, products, unit_values

Halves = dict[str, tuple[Tensor, Tensor]]  # group -> of each network, [units, units]: who is zipped


def zipit(
    spec: Spec,
    states: Sequence[State],
    modules: Sequence[nn.Module],
    batches: Iterable[Any],
    groups: Collection[str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two networks that share what they compute up to a chosen layer, and have the rest apart:
    `W* = Σ_i M_i W_i U_i` for the layers that are shared.

    ZipIt! (arXiv 2305.03053). The 2 n units of a group are zipped in pairs, the two of the highest
    correlation on the inputs first, of one network or of both, until n pairs are left. A pair's
    unit is the mean of its two (M, entries 1/2), and whatever read one of the two reads the pair
    (U, entries 1). Layers that make no shared units (the heads, and all after the chosen layer)
    stay each network's own, with U on their inputs. `repair(spec, zipped, [zipped], batches)`
    computes the statistics of batch norms anew.

    Args:
        spec: of both networks.
        states: two state dicts, of the same or of other tasks; left unchanged.
        modules: the networks, which hold these weights.
        batches: unlabeled inputs, of both networks' tasks.
        groups: the groups to zip, all if None. Up to a layer: the first names of `spec.groups`.

    Returns:
        The two networks' state dicts. Tensors that they share are the same objects.

    Raises:
        AdamergeError: not two networks, an unknown group, no batches, or a tensor that makes
            zipped units of units that are not zipped: naming tensor and axis.

    >>> from adamerge import align
    >>> one, two = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    >>> states = one.state_dict(), two.state_dict()
    >>> zipped = align.zipit(align.spec(one), states, (one, two), [torch.randn(20, 3)])
    >>> zipped[0]["0.weight"] is zipped[1]["0.weight"], zipped[0]["2.weight"].shape
    (True, torch.Size([2, 8]))
    """
    names = list(spec.groups) if groups is None else list(groups)
    unknown = [name for name in names if name not in spec.groups]
    if len(states) != 2 or len(modules) != 2 or unknown:
        raise AdamergeError(
            f"zipit: {len(states)} state dicts and {len(modules)} modules were given"
            + (f", and the group {unknown[0]!r}, which the spec has not" if unknown else "")
            + ": expected two networks, and groups of the spec"
        )
    for index, state in enumerate(states):
        spec.check(state, f"network {index}")
    wanted = Spec({name: spec.groups[name] for name in spec.groups if name in names})
    halves = _zipped(wanted, modules, list(batches))
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = (dict(states[0]), dict(states[1]))
    for tensor in states[0]:
        touching = list(wanted.touching(tensor))
        if not touching:
            continue
        parts = [
            _carried(state[tensor], touching, halves, index) for index, state in enumerate(states)
        ]
        if any(not place.reads for _, place in touching):
            _check_inputs(spec, tensor, names)
            parts = [parts[0] + parts[1]] * 2
        found[0][tensor], found[1][tensor] = parts
    return found


def _zipped(spec: Spec, modules: Sequence[nn.Module], batches: list[Any]) -> Halves:
    """Who is zipped with whom, of the correlations of all units of both networks."""

    def together(batch: Any) -> dict[str, list[Tensor]]:
        one, other = (unit_values(spec, module, batch) for module in modules)
        return {
            name: [torch.cat(pair) for pair in zip(one[name], other[name], strict=True)]
            for name in one
        }

    with evaluating(*modules):
        found = products((values, values) for values in map(together, batches))
    halves = {}
    for name, layers in found.items():
        likeness = torch.stack([layer.correlation() for layer in layers]).sum(0)
        pairs = greedy_pairs(likeness)
        units = len(pairs)
        members = torch.zeros(units, 2 * units, dtype=torch.float64)
        members[torch.arange(units)[:, None], torch.tensor(pairs)] = 1
        halves[name] = members[:, :units], members[:, units:]
    return halves


def greedy_pairs(likeness: Tensor) -> list[tuple[int, int]]:
    """All units `[2 n]` in pairs: always the two that are most alike of those that are left."""
    count = len(likeness)
    rows, columns = torch.triu_indices(count, count, 1)
    order = likeness.cpu()[rows, columns].argsort(descending=True, stable=True)
    free, pairs = [True] * count, []
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if free[row] and free[column]:
            free[row] = free[column] = False
            pairs.append((row, column))
            if 2 * len(pairs) == count:
                break
    return pairs


def _carried(
    tensor: Tensor, touching: Sequence[tuple[str, Place]], halves: Halves, index: int
) -> Tensor:
    """One network's part in a tensor."""
    for name, place in touching:
        members = halves[name][index]
        tensor = carry(tensor, place, members if place.reads else members / 2)
    return tensor


def _check_inputs(spec: Spec, tensor: str, names: Collection[str]) -> None:
    """Shared layers read shared units, or inputs."""
    for name, place in spec.touching(tensor):
        if name not in names:
            raise AdamergeError(
                f"zipit: tensor {tensor!r} would be shared, and its axis {place.axis} is of the "
                f"group {name!r}, which is not: zip that group too, or leave out those that "
                f"{tensor!r} makes"
            )
