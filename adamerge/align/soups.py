"""Model soups: averaging the weights of several fine-tunings of one model.

Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time (arXiv 2203.05482).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.align.symmetry import State

Score = Callable[[dict[str, Tensor]], float]


def average(states: Sequence[State], shares: Sequence[float] | None = None) -> dict[str, Tensor]:
    """`Σ_i s_i θ_i`, tensor by tensor, summed in float64 and kept in the type of the first.

    Args:
        states: state dicts of one architecture; integers are taken from the first.
        shares: s, `[networks]`; equal ones if None.

    Raises:
        AdamergeError: no networks, another number of shares, or a missing, extra or mis-shaped
            tensor.
    """
    if not states:
        raise AdamergeError("no state dicts were given: an average needs at least one")
    shares = [1 / len(states)] * len(states) if shares is None else list(shares)
    if len(shares) != len(states):
        raise AdamergeError(
            f"{len(shares)} shares were given for {len(states)} networks: give one for each"
        )
    first = states[0]
    for index, state in enumerate(states):
        for name in [*first, *state]:
            ours, theirs = first.get(name), state.get(name)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                shapes = [list(t.shape) if t is not None else "missing" for t in (ours, theirs)]
                raise AdamergeError(
                    f"tensor {name!r} is {shapes[1]} in network {index}, {shapes[0]} in network 0: "
                    "average networks of one architecture"
                )
    found = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            found[name] = tensor.clone()
            continue
        total = torch.zeros_like(tensor, dtype=torch.float64)
        for share, state in zip(shares, states, strict=True):
            total.add_(state[name].detach().to(total), alpha=share)
        found[name] = total.to(tensor.dtype)
    return found


def uniform(states: Sequence[State]) -> dict[str, Tensor]:
    """The uniform soup: the mean of all networks' weights. Model soups (arXiv 2203.05482).

    Args:
        states: state dicts of fine-tunings of one pretrained model; left unchanged.

    Raises:
        AdamergeError: no networks, or tensors that differ in name or shape.

    >>> uniform([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}])["w"]
    tensor([2.5000])
    """
    return average(states)


def greedy(
    states: Sequence[State], score: Score, protocol: Literal["heldout", "paper"] = "heldout"
) -> tuple[dict[str, Tensor], list[int]]:
    """The greedy soup: networks from the best to the worst, each kept if the mean with it scores
    no lower than without. Model soups (arXiv 2203.05482), recipe 1.

    Args:
        states: state dicts of fine-tunings of one pretrained model; left unchanged.
        score: state dict -> a number, higher is better: accuracy on held-out images with labels.
        protocol: of the images behind `score`; under `paper` they are those that are reported on,
            which a choice by labels must not see.

    Returns:
        The soup, and the indices of the networks in it, from the best.

    Raises:
        AdamergeError: no networks, tensors that differ in name or shape, a score that is NaN, or
            protocol paper.

    >>> states = [{"w": torch.tensor(value)} for value in (0.0, 1.0, 3.0)]
    >>> greedy(states, lambda state: -abs(float(state["w"]) - 1.5))
    ({'w': tensor(2.)}, [1, 2])
    """
    if protocol == "paper":
        raise AdamergeError(
            "a greedy soup chooses by labels, and under protocol paper the images it would choose "
            "on are those that are scored: use protocol heldout, or the uniform soup"
        )
    if not states:
        raise AdamergeError("no state dicts were given: a soup needs at least one")
    alone = [_score(score, dict(state), f"network {index}") for index, state in enumerate(states)]
    order = sorted(range(len(states)), key=lambda index: -alone[index])
    kept, soup, best = order[:1], average([states[order[0]]]), alone[order[0]]
    for index in order[1:]:
        tried = average([states[i] for i in [*kept, index]])
        found = _score(score, tried, f"the soup with network {index}")
        if found >= best:
            kept, soup, best = [*kept, index], tried, found
    return soup, kept


def _score(
    score: Callable[[dict[str, Tensor]], float], state: dict[str, Tensor], what: str
) -> float:
    found = float(score(state))
    if found != found:
        raise AdamergeError(f"greedy: the score of {what} is NaN, expected a number")
    return found
