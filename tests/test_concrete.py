"""Concrete masks: their samples, phases and gradients; the reference numbers are elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adamerge
from adamerge import AdamergeError
from adamerge.methods import Concrete
from adamerge.transforms.draws import uniform
from tests import golden_data as golden

NAME = "transformer.resblocks.0.attn.out_proj.weight"


def concrete(**settings: Any) -> Concrete:
    return Concrete(golden.clip().backbone, golden.task_vectors(), **settings)


def learned(method: Concrete) -> set[str]:
    """What one backward pass gives a gradient."""
    method.zero_grad()
    images, ids = golden.batch(0)
    method(images, ids).square().sum().backward()
    return {n.partition(".")[0] for n, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_weights_and_gradients_are_those_of_plain_sums(granularity: Any) -> None:
    method = concrete(granularity=granularity, temperature=0.7, seed=5)
    vectors = method.task_vectors
    column = vectors.names.index(NAME)
    with torch.no_grad():
        method.logits[column].normal_()
        method.coefficients.normal_()
    method.begin_step(3)
    logits = method.logits[column].detach().clone().requires_grad_()
    coefficients = method.coefficients.detach().clone().requires_grad_()
    drawn = uniform(5, "sample 3", NAME, logits.shape).double()
    soft = 1 / (1 + ((1 - drawn) / drawn * torch.exp(-logits)) ** (1 / 0.7))
    used = coefficients[:, column] if granularity == "layer" else coefficients
    total = sum(c * tau for c, tau in zip(used, vectors.deltas[NAME], strict=True))
    merged = vectors.pretrained[NAME] + soft / soft.mean() * total
    found = method.weights()[NAME]
    torch.testing.assert_close(found, merged, rtol=1e-6, atol=1e-8)
    pull = torch.randn(merged.shape).double()
    (merged * pull).sum().backward()
    (found * pull).sum().backward()
    torch.testing.assert_close(method.logits[column].grad, logits.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(method.coefficients.grad, coefficients.grad, rtol=1e-5, atol=1e-9)


def test_samples_differ_by_step_and_seed_and_nothing_else() -> None:
    one, other = concrete(), concrete()
    seen = []
    for step in (0, 1, 0):
        for method in (one, other):
            method.begin_step(step)
        torch.manual_seed(step)
        assert torch.equal(one.mask(NAME), other.mask(NAME))
        seen.append(one.mask(NAME))
        torch.testing.assert_close(seen[-1].mean(), torch.ones(()).double())
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert not torch.equal(concrete(seed=1).mask(NAME), concrete().mask(NAME))


def test_two_phases() -> None:
    method = concrete(mask_steps=2)
    method.begin_step(1)
    assert method.sample == 1 and learned(method) == {"logits", "coefficients"}
    method.begin_step(2)
    assert method.sample is None and learned(method) == {"coefficients"}
    last = method.mask(NAME)
    method.begin_step(7)
    assert torch.equal(method.mask(NAME), last), "the second phase has one sample"
    method.begin_step(0)
    images, ids = golden.batch(0)
    folded = method.fold()(images, ids)
    assert not torch.equal(folded, method(images, ids)), "a step's sample is not what is folded"
    assert method.sample == 0
    method.begin_step(2)
    torch.testing.assert_close(folded, method(images, ids))


def test_fixed_coefficients_are_not_learned() -> None:
    method = concrete(granularity="fixed", init=0.25)
    assert learned(method) == {"logits"} and not method.coefficients.requires_grad
    _, table = method.coefficient_table()
    assert table.shape == (3, 32) and bool((table == 0.25).all())


def test_the_levels_of_the_paper_are_learned_apart() -> None:
    method = concrete()
    for part in ("logits", "coefficients"):
        method.learns = (part,)
        assert learned(method) == {part}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "block"}, "granularity is 'block': expected 'layer', 'task' or 'fixed'"),
        ({"mask_steps": -1}, r"Concrete: mask_steps is -1, expected a whole number in \[0,"),
        ({"mask_steps": 2.5}, r"Concrete: mask_steps is 2.5, expected a whole number in \[0,"),
        ({"mask_steps": 0, "granularity": "fixed"}, r"0, expected a whole number in \[1,"),
        ({"temperature": 0.0}, r"Concrete: temperature is 0.0, expected a number in \(0,"),
        ({"temperature": "abc"}, r"Concrete: temperature is 'abc', expected a number"),
        ({"init": float("nan")}, "Concrete: init is nan, expected a number"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdamergeError, match=message):
        concrete(**settings)


def test_a_plain_loop_ends_with_the_mask_where_coefficients_are_fixed() -> None:
    images, ids = golden.batch(0)
    method = concrete(mask_steps=2, granularity="fixed")
    with pytest.raises(AdamergeError, match=r"learned for 2 steps .* step 2 would learn nothing"):
        adamerge.adapt(method, [(images, ids)], heads=golden.heads(), steps=3)


def test_a_plain_loop_goes_through_both_phases() -> None:
    images, ids = golden.batch(0)
    again = concrete(mask_steps=2)
    adamerge.adapt(again, [(images, ids)], heads=golden.heads(), steps=4, lr=0.1)
    short = concrete(mask_steps=2)
    adamerge.adapt(short, [(images, ids)], heads=golden.heads(), steps=2, lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, short.logits, strict=True))
    assert any(tensor.any() for tensor in short.logits)
    assert not torch.equal(again.coefficients, short.coefficients)
