"""Matching finds permuted copies again, exactly; many networks; identities among experts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from adamerge import AdamergeError, align
from tests import golden_data as golden
from tests.test_align import NETWORKS, chain, filled, outputs


def tensors_with_units(spec: align.Spec) -> set[str]:
    return {place.tensor for group in spec.groups.values() for place in group.places}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_copy_is_found_again_by_its_weights(name: str) -> None:
    build, inputs, _ = NETWORKS[name]
    module = filled(build)
    spec, state, batch = align.spec(module), module.state_dict(), inputs()
    shuffled = align.apply(spec, align.drawn(spec, 1), state)
    for seed in range(8):  # a local optimum is found of some orders
        orders = align.weight_matching(spec, state, shuffled, seed)
        found = align.apply(spec, orders, shuffled)
        if all(torch.equal(found[key], state[key]) for key in state):
            break
    middle = build().double().eval()
    middle.load_state_dict(align.uniform([state, found]))
    for old, new in zip(outputs(module, batch), outputs(middle, batch), strict=True):
        torch.testing.assert_close(new, old, atol=1e-9, rtol=1e-9)  # no barrier
    assert align.agreement(spec, state, found) >= align.agreement(spec, state, shuffled)


# Without one of which some units put out the same number for all inputs: they look alike.
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "timm efficientnet"])
def test_a_permuted_copy_is_found_again_by_its_outputs(name: str) -> None:
    build, inputs, _ = NETWORKS[name]
    module, other = filled(build), build().double().eval()
    spec, state = align.spec(module), module.state_dict()
    shuffled = align.apply(spec, align.drawn(spec, 1), state)
    other.load_state_dict(shuffled)
    batches = [inputs() for _ in range(3)]
    if isinstance(batches[0], Tensor) and name.startswith("bert"):
        batches = [{"input_ids": batch} for batch in batches]
    found = align.activation_matching(spec, module, other, batches)
    restored = align.apply(spec, found, shuffled)
    for key in tensors_with_units(spec):
        torch.testing.assert_close(restored[key], state[key])


def test_two_layers_are_matched_as_trying_all_permutations_does() -> None:
    """One group: coordinate descent is exact. Against all 120 orders, loop by loop."""
    torch.manual_seed(0)
    one, two = chain(5).double().state_dict(), chain(5).double().state_dict()
    spec = align.spec(chain(5))
    best = max(
        itertools.permutations(range(5)),
        key=lambda p: (
            sum(
                one["0.weight"][i, j] * two["0.weight"][p[i], j] for i in range(5) for j in range(3)
            )
            + sum(one["0.bias"][i] * two["0.bias"][p[i]] for i in range(5))
            + sum(
                one["2.weight"][k, i] * two["2.weight"][k, p[i]] for i in range(5) for k in range(2)
            )
        ),
    )
    assert align.weight_matching(spec, one, two)["0"].tolist() == list(best)


class Stack(nn.Module):
    """A residual stream that every layer reads and writes: one group on both axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.inner = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.inner:
            x = x + torch.tanh(layer(x))
        return self.last(x)


def test_a_group_on_both_axes_of_a_tensor_never_loses() -> None:
    torch.manual_seed(0)
    spec = align.spec(Stack())
    assert list(spec.groups) == ["first"] and len(spec.groups["first"].places) == 9
    for _ in range(10):
        one, two = Stack().state_dict(), Stack().state_dict()
        found = align.apply(spec, align.weight_matching(spec, one, two), two)
        assert align.agreement(spec, one, found) >= align.agreement(spec, one, two)


def test_the_order_is_the_seeds() -> None:
    module, other = filled(NETWORKS["mlp"][0]), filled(NETWORKS["mlp"][0], 1)
    spec = align.spec(module)
    states = module.state_dict(), other.state_dict()
    one, two = (align.weight_matching(spec, *states, seed=3) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    again = align.weight_matching(spec, *states, seed=4, start=one)
    assert all(torch.equal(one[name], again[name]) for name in one)  # nothing is left to gain


@pytest.mark.parametrize("to", ["first", "mean"])
def test_many_copies_become_one(to: str) -> None:
    state = filled(lambda: chain(6)).state_dict()
    spec = align.spec(chain(6))
    copies = [align.apply(spec, align.drawn(spec, seed), state) for seed in range(4)]
    for found in align.many(spec, copies, to):
        for name in state:
            torch.testing.assert_close(found[name], copies[0][name])


def test_experts_of_one_pretrained_tower_are_aligned_already() -> None:
    tower = golden.clip().backbone
    spec = align.spec(tower)
    assert {"stream"} < set(spec.groups)
    pretrained = golden.state("pretrained", torch.float32)
    for task in golden.TASKS:
        expert = golden.state(f"expert_{task}", torch.float32)
        found = align.weight_matching(spec, pretrained, expert)
        assert all(torch.equal(found[n], order) for n, order in align.identities(spec).items())


def test_mistakes_are_named() -> None:
    spec, state = align.spec(chain()), chain().state_dict()
    wide = {**state, "0.weight": torch.zeros(8, 4)}
    with pytest.raises(AdamergeError, match=r"'0.weight' is \[8, 3\], .* \[8, 4\].*ot_fusion"):
        align.weight_matching(spec, wide, state)
    with pytest.raises(AdamergeError, match="no batches"):
        align.activation_matching(spec, chain(), chain(), [])
    with pytest.raises(AdamergeError, match="many: to is 'last'"):
        align.many(spec, [state], "last")  # type: ignore[arg-type]
    raw = align.Spec({"h": align.Group(8, (align.Place("2.weight", 1, reads=True),))})
    with pytest.raises(AdamergeError, match=r"group 'h' has no linear.*'2.weight'"):
        align.activation_matching(raw, chain(), chain(), [torch.randn(2, 3)])
