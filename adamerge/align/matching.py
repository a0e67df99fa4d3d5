"""Permutations that align the units of one network with those of another.

Git Re-Basin: Merging Models modulo Permutation Symmetries (arXiv 2209.04836): activation matching
(section 3.1), weight matching (section 3.2), and more than two networks (appendix A.10).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.align.soups import average
from adamerge.align.symmetry import (
    Permutations,
    Spec,
    State,
    apply,
    identities,
    permuted,
    unfold,
)
from adamerge.align.units import evaluating, products, unit_values
from adamerge.weights.differences import is_buffer

_GAIN = 1e-12  # below it, a permutation is no better than the one before


def weight_matching(
    spec: Spec,
    reference: State,
    state: State,
    seed: int = 0,
    start: Mapping[str, Tensor] | None = None,
) -> Permutations:
    """Permutations P of a network's units that bring its weights closest to a reference's:
    `argmax_P Σ_W ⟨W_reference, P(W)⟩`, W all parameters with units.

    Git Re-Basin (arXiv 2209.04836), section 3.2: coordinate descent. Each group's permutation
    solves a linear assignment exactly while the others stay, in random order, until none gains
    more than 1e-12. Where a group stands on two axes of one tensor the assignment is of the
    linearised gain, and is taken only if the true one grows. Statistics of batch norm are permuted
    by `apply`, but have no say. The result is a local optimum: seeds may differ.

    Args:
        spec: of both networks.
        reference: the state dict to come close to.
        state: of the network to be permuted; left unchanged.
        seed: of the order of groups.
        start: permutations to begin with; the identities if None.

    Returns:
        group -> p `[units]`, for `apply(spec, p, state)`.

    Raises:
        AdamergeError: a tensor and axis that do not fit, or a tensor whose shape differs.

    >>> from adamerge import align
    >>> module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec, state = align.spec(module), module.state_dict()
    >>> shuffled = align.apply(spec, align.drawn(spec, seed=1), state)
    >>> found = align.weight_matching(spec, state, shuffled)
    >>> torch.equal(align.apply(spec, found, shuffled)["0.weight"], state["0.weight"])
    True
    """
    orders = {**identities(spec), **(start or {})}
    current = apply(spec, orders, state)
    spec.check(reference, "the reference")
    for name in {place.tensor for group in spec.groups.values() for place in group.places}:
        if reference[name].shape != current[name].shape:
            raise AdamergeError(
                f"tensor {name!r} is {list(current[name].shape)}, in the reference "
                f"{list(reference[name].shape)}: weight_matching needs networks of one shape, "
                "ot_fusion takes different widths"
            )
    names = list(spec.groups)
    tensors = {n: {place.tensor for place in spec.groups[n].places} for n in names}
    generator = torch.Generator().manual_seed(seed)
    settled: set[str] = set()  # whose last assignment still stands
    while len(settled) < len(names):
        for index in torch.randperm(len(names), generator=generator).tolist():
            name = names[index]
            if name in settled:
                continue
            settled.add(name)
            better = _improved(spec, name, reference, current)
            if better is None:
                continue
            order, moved = better
            current.update(moved)
            orders[name] = orders[name][order]
            neighbours = {n for n in names if tensors[n] & tensors[name]} - {name}
            settled -= neighbours | ({name} if _twice(spec, name) else set())
    return orders


def _twice(spec: Spec, name: str) -> bool:
    """Whether a group stands on two axes of one tensor."""
    tensors = [place.tensor for place in spec.groups[name].places]
    return len(set(tensors)) < len(tensors)


def _improved(
    spec: Spec, name: str, reference: State, current: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """A better permutation of one group, and the tensors it moves; None if there is none."""
    group = spec.groups[name]
    gains = torch.zeros(group.units, group.units, dtype=torch.float64)
    for place in group.places:
        if _counts(place.tensor, reference):
            ours = unfold(_exact(reference[place.tensor]), place, group.units)
            theirs = unfold(_exact(current[place.tensor]), place, group.units)
            gains += (ours @ theirs.T).double().cpu()
    order = torch.from_numpy(linear_sum_assignment(gains.numpy(), maximize=True)[1])
    if torch.equal(order, torch.arange(group.units)):
        return None
    moved: dict[str, Tensor] = {}
    for place in group.places:
        before = moved.get(place.tensor, current[place.tensor])
        moved[place.tensor] = permuted(before, place, order)
    gain = 0.0
    for tensor, after in moved.items():
        if _counts(tensor, reference):
            change = after.double() - current[tensor].double()
            gain += float((reference[tensor].double() * change).sum())
    return (order, moved) if gain > _GAIN else None


def _counts(name: str, reference: State) -> bool:
    tensor = reference[name]
    return tensor.is_floating_point() and not is_buffer(name, tensor)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def agreement(spec: Spec, reference: State, state: State) -> float:
    """What `weight_matching` maximises, `Σ_W ⟨W_reference, W⟩` over tensors with units."""
    names = {place.tensor for group in spec.groups.values() for place in group.places}
    counted = sorted(name for name in names if _counts(name, reference))
    return sum(float((reference[n].double() * state[n].double()).sum()) for n in counted)


def activation_matching(
    spec: Spec, reference_module: nn.Module, module: nn.Module, batches: Iterable[Any]
) -> Permutations:
    """Permutations P of a network's units that correlate best with a reference's on the same
    inputs: for each group `argmax_P Σ_i corr(a_i, b_P(i))`.

    Git Re-Basin (arXiv 2209.04836), section 3.1, with correlations as in Convergent Learning
    (arXiv 1511.07543): one linear assignment per group. Where several layers make or normalise a
    group's units (a residual stream) their correlations are added. Outputs are taken as layers
    give them, before activation functions.

    Args:
        spec: of both modules.
        reference_module: left unchanged, run in evaluation mode.
        module: the network to be permuted, likewise.
        batches: unlabeled inputs: tensors, tuples of arguments, or mappings of named ones.

    Returns:
        group -> p `[units]`, for `apply(spec, p, module.state_dict())`.

    Raises:
        AdamergeError: no batches, or a group without a layer that makes its units.

    >>> from adamerge import align
    >>> module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> align.activation_matching(align.spec(module), module, module, [torch.randn(20, 3)])["0"]
    tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    with evaluating(reference_module, module):
        found = products(
            (unit_values(spec, reference_module, batch), unit_values(spec, module, batch))
            for batch in batches
        )
    orders = {}
    for name, layers in found.items():
        likeness = torch.stack([layer.correlation() for layer in layers]).sum(0)
        order = linear_sum_assignment(likeness.cpu().numpy(), maximize=True)[1]
        orders[name] = torch.from_numpy(order)
    return orders


def many(
    spec: Spec,
    states: Sequence[State],
    to: Literal["first", "mean"] = "first",
    seed: int = 0,
    match: Callable[..., Permutations] = weight_matching,
) -> list[dict[str, Tensor]]:
    """The state dicts of many networks, aligned with the first, or with their mean.

    `first`: each is matched to the first as it is. `mean`: as MergeMany of Git Re-Basin (arXiv
    2209.04836, appendix A.10): each in turn is matched to the mean of all others, in random order,
    until no permutation changes (at most 100 rounds).

    Args:
        spec: of all networks.
        states: left unchanged.
        to: what to align with.
        seed: of the orders.
        match: `match(spec, reference, state, seed=…)`.

    Raises:
        AdamergeError: no networks, or another word than `first` and `mean`.

    >>> from adamerge import align
    >>> module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec, state = align.spec(module), module.state_dict()
    >>> shuffled = [align.apply(spec, align.drawn(spec, s), state) for s in range(3)]
    >>> aligned = align.many(spec, shuffled, to="mean")
    >>> bool((align.uniform(aligned)["0.weight"] - aligned[0]["0.weight"]).abs().max() < 1e-6)
    True
    """
    if not states or to not in ("first", "mean"):
        raise AdamergeError(
            f"many: to is {to!r} with {len(states)} networks, expected 'first' or 'mean' and at "
            "least one network"
        )
    aligned = [dict(states[0])]
    for state in states[1:]:
        reference = aligned[0] if to == "first" else average(aligned)
        aligned.append(apply(spec, match(spec, reference, state, seed=seed), state))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(100 if to == "mean" and len(states) > 2 else 0):
        changed = False
        for index in torch.randperm(len(aligned), generator=generator).tolist():
            mean = average([s for other, s in enumerate(aligned) if other != index])
            orders = match(spec, mean, aligned[index], seed=seed)
            fixed = identities(spec)
            if any(not torch.equal(order, fixed[name]) for name, order in orders.items()):
                aligned[index] = apply(spec, orders, aligned[index])
                changed = True
        if not changed:
            break
    return aligned
