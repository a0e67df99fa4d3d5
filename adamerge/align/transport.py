"""Fusion of networks whose units are matched softly, by optimal transport.

Model Fusion via Optimal Transport (arXiv 1910.05653).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.align.soups import average
from adamerge.align.symmetry import Spec, State, carry, unfold
from adamerge.align.units import evaluating, products, unit_values
from adamerge.weights.differences import is_buffer


def ot_fusion(
    spec: Spec | Sequence[Spec],
    states: Sequence[State],
    shares: Sequence[float] | None = None,
    modules: Sequence[nn.Module] = (),
    batches: Iterable[Any] = (),
) -> dict[str, Tensor]:
    """The barycentre of networks whose units are transported onto those of the first:
    `W = Σ_i s_i W̃_i`, `W̃ = diag(1/β) Tᵀ W T' diag(1/α')` for each layer.

    Model Fusion via Optimal Transport (arXiv 1910.05653). Group by group, in the order in which
    the network computes them, T `[units, units of the first]` is the exact optimal transport
    between units of equal mass (1/α and 1/β are the numbers of units), and the layers that read
    them get T' of the group that they read. The cost of two units is the squared distance of the
    weights that make them, biases and scales included, their inputs being transported already; or,
    where `modules` and `batches` are given, the mean squared distance of their outputs on those
    inputs. Inputs are divided by α and outputs by β: for networks of one width that is the paper's
    rule; for other widths it keeps the sum over inputs, so that a network whose units were doubled
    is transported exactly.

    Networks may differ in width, not in depth; their shared inputs and outputs have one width.
    The result has the first network's shapes. Statistics of batch norm are transported too:
    `repair` computes them anew.

    Args:
        spec: of all networks, or one for each where their widths differ.
        states: T state dicts; left unchanged.
        shares: s, `[networks]`; equal ones if None.
        modules: the networks, for a cost of outputs.
        batches: unlabeled inputs, for the same.

    Raises:
        AdamergeError: POT is not installed, a number of specs, shares or modules that does not
            fit, tensors that do not fit, or units that no layer makes whose inputs are known.

    >>> from adamerge import align
    >>> module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> spec, state = align.spec(module), module.state_dict()
    >>> shuffled = align.apply(spec, align.drawn(spec, seed=1), state)
    >>> fused = align.ot_fusion(spec, [state, shuffled])
    >>> bool((fused["0.weight"] - state["0.weight"]).abs().max() < 1e-6)
    True
    """
    specs = [spec] * len(states) if isinstance(spec, Spec) else list(spec)
    if len(specs) != len(states) or (modules and len(modules) != len(states)):
        raise AdamergeError(
            f"ot_fusion: {len(specs)} specs and {len(modules)} modules were given for "
            f"{len(states)} networks: give one for each"
        )
    for index, (one, state) in enumerate(zip(specs, states, strict=True)):
        one.check(state, f"network {index}")
        if list(one.groups) != list(specs[0].groups):
            raise AdamergeError(
                f"ot_fusion: the groups of network {index} are not those of network 0: fuse "
                "networks of one depth and architecture"
            )
    inputs = list(batches) if modules else []
    fused = [dict(state) for state in states[:1]]
    for index in range(1, len(states)):
        costs = {}
        if modules:
            costs = _distances(specs, modules, index, inputs)
        pair = specs[0], specs[index]
        fused.append(_transported(pair, states[0], states[index], costs))
    return average(fused, shares)


def _distances(
    specs: Sequence[Spec], modules: Sequence[nn.Module], index: int, inputs: list[Any]
) -> dict[str, Tensor]:
    """Group -> the mean squared distances of outputs, `[units, units of the first]`."""
    with evaluating(modules[0], modules[index]):
        found = products(
            (unit_values(specs[index], modules[index], x), unit_values(specs[0], modules[0], x))
            for x in inputs
        )
    return {n: torch.stack([p.distances() for p in layers]).sum(0) for n, layers in found.items()}


def _transported(
    specs: tuple[Spec, Spec], target: State, state: State, costs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A network with its units on those of the target."""
    moved = dict(state)
    done: set[tuple[str, int]] = set()  # axes that are the target's
    waiting = {(p.tensor, p.axis) for group in specs[1].groups.values() for p in group.places}
    for name, group in specs[1].groups.items():
        wanted = specs[0].groups[name].units
        cost = costs.get(name)
        if cost is None:
            cost = _weight_cost(specs, name, target, moved, waiting - done)
        plan = _plan(cost)  # [units, wanted]
        for place in group.places:
            scale = group.units if place.reads else wanted
            moved[place.tensor] = carry(moved[place.tensor], place, scale * plan.T)
            done.add((place.tensor, place.axis))
    return moved


def _weight_cost(
    specs: tuple[Spec, Spec],
    name: str,
    target: State,
    moved: Mapping[str, Tensor],
    waiting: set[tuple[str, int]],
) -> Tensor:
    """Squared distances of the weights that make the units, `[units, units of the target]`."""
    ours, theirs = specs[1].groups[name], specs[0].groups[name]
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for place in ours.places:
        tensor = moved[place.tensor]
        axes = {(place.tensor, axis) for axis in range(tensor.ndim) if axis != place.axis}
        if place.reads or axes & waiting or is_buffer(place.tensor, tensor):
            continue
        rows[0].append(unfold(tensor.double(), place, ours.units))
        rows[1].append(unfold(target[place.tensor].double(), place, theirs.units))
        if rows[0][-1].shape[1] != rows[1][-1].shape[1]:
            raise AdamergeError(
                f"ot_fusion: tensor {place.tensor!r} is {list(tensor.shape)} once its inputs are "
                f"transported, in the first network {list(target[place.tensor].shape)}: along "
                f"axis {place.axis} widths may differ, along no other that no group permutes"
            )
    if not rows[0]:
        raise AdamergeError(
            f"ot_fusion: the units of group {name!r} are made by no tensor whose inputs have been "
            "transported: give modules and batches, for a cost of their outputs"
        )
    return torch.cdist(torch.cat(rows[0], 1), torch.cat(rows[1], 1)).square()


def _plan(cost: Tensor) -> Tensor:
    """The exact transport between equal masses, `[units, units]`, with total mass 1."""
    try:
        import ot  # type: ignore[import-untyped]
    except ImportError as error:
        raise AdamergeError("ot_fusion needs the package POT: pip install POT") from error
    rows, columns = cost.shape
    scaled = (cost / cost.max().clamp_min(1e-300)).cpu().numpy()
    masses = [torch.full((n,), 1 / n, dtype=torch.float64).numpy() for n in (rows, columns)]
    return torch.from_numpy(ot.emd(*masses, scaled, numItermax=10**7))
