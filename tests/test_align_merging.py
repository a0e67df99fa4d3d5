"""OT fusion against plain loops, REPAIR's statistics, ZipIt's two networks, soups."""

from __future__ import annotations

import copy
import itertools
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adamerge import AdamergeError, align
from tests.test_align import NETWORKS, Residual, chain, filled


def deep(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().requires_grad_(False)


def transport(cost: list[list[float]]) -> list[list[float]]:
    """The exact transport of equal masses, by trying all assignments of equal shares."""
    rows, columns = len(cost), len(cost[0])
    shares = math.lcm(rows, columns)
    best = min(
        set(itertools.permutations([j for j in range(columns) for _ in range(shares // columns)])),
        key=lambda p: sum(cost[k * rows // shares][j] for k, j in enumerate(p)),
    )
    plan = [[0.0] * columns for _ in range(rows)]
    for k, j in enumerate(best):
        plan[k * rows // shares][j] += 1 / shares
    return plan


def plain_fusion(target: nn.Sequential, other: nn.Sequential) -> list[tuple[Tensor, Tensor]]:
    """The paper's rule for a chain, entry by entry; weight and bias of every layer, fused."""
    fused, before = [], None
    layers = [(a, b) for a, b in zip(target, other, strict=True) if isinstance(a, nn.Linear)]
    for index, (ours, theirs) in enumerate(layers):
        weight, bias = theirs.weight, theirs.bias
        if before is not None:  # inputs onto those of the target
            new = torch.zeros(len(weight), len(before[0]), dtype=torch.float64)
            for o in range(len(weight)):
                for j in range(len(before[0])):
                    for i in range(len(before)):
                        new[o, j] += weight[o, i] * before[i][j] * len(before)
            weight = new
        if index == len(layers) - 1:
            fused.append(((ours.weight + weight) / 2, (ours.bias + bias) / 2))
            break
        cost = [
            [
                float(((weight[i] - ours.weight[j]) ** 2).sum() + (bias[i] - ours.bias[j]) ** 2)
                for j in range(len(ours.weight))
            ]
            for i in range(len(weight))
        ]
        before = transport(cost)
        rows, shifts = torch.zeros_like(ours.weight), torch.zeros_like(ours.bias)
        for j in range(len(rows)):
            for i in range(len(weight)):
                rows[j] += before[i][j] * len(rows) * weight[i]
                shifts[j] += before[i][j] * len(rows) * bias[i]
        fused.append(((ours.weight + rows) / 2, (ours.bias + shifts) / 2))
    return fused


@pytest.mark.parametrize("widths", [(5, 4), (3, 6), (6, 3)])
def test_ot_fusion_is_the_plain_loop(widths: tuple[int, int]) -> None:
    pytest.importorskip("ot")
    torch.manual_seed(0)
    first = deep(3, 5 if widths == (5, 4) else 3, 4 if widths == (5, 4) else 6, 2)
    other = deep(3, *widths, 2)
    specs = [align.spec(first), align.spec(other)]
    found = align.ot_fusion(specs, [first.state_dict(), other.state_dict()])
    for index, (weight, bias) in enumerate(plain_fusion(first, other)):
        torch.testing.assert_close(found[f"{2 * index}.weight"], weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found[f"{2 * index}.bias"], bias, atol=1e-6, rtol=1e-6)


def doubled(module: nn.Sequential) -> nn.Sequential:
    """A chain of one hidden layer, with every unit there twice: the same function."""
    wide = deep(3, 8, 2)
    wide[0].weight.copy_(module[0].weight.repeat(2, 1))
    wide[0].bias.copy_(module[0].bias.repeat(2))
    wide[2].weight.copy_(module[2].weight.repeat(1, 2) / 2)
    wide[2].bias.copy_(module[2].bias)
    return wide


@pytest.mark.parametrize("by", ["weights", "outputs"])
def test_another_width_is_transported_exactly(by: str) -> None:
    pytest.importorskip("ot")
    torch.manual_seed(0)
    narrow = deep(3, 4, 2)
    wide = doubled(narrow)
    x = torch.randn(50, 3, dtype=torch.float64)
    for one, two in ((narrow, wide), (wide, narrow)):
        pair = [one, two] if by == "outputs" else []
        states = [one.state_dict(), two.state_dict()]
        specs = [align.spec(one), align.spec(two)]
        fused = copy.deepcopy(one)
        fused.load_state_dict(align.ot_fusion(specs, states, modules=pair, batches=[x]))
        torch.testing.assert_close(fused(x), one(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["resnet batchnorm", "open_clip vit", "bert classifier"])
def test_three_permuted_copies_fuse_into_one(name: str) -> None:
    pytest.importorskip("ot")
    module = filled(NETWORKS[name][0])
    spec, state = align.spec(module), module.state_dict()
    copies = [align.apply(spec, align.drawn(spec, seed), state) for seed in (1, 2)]
    fused = align.ot_fusion(spec, [state, *copies], shares=[0.2, 0.5, 0.3])
    for key in state:
        torch.testing.assert_close(fused[key], state[key], atol=1e-9, rtol=1e-9)


def test_ot_fusion_names_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [chain().state_dict(), chain(9).state_dict()]
    specs = [align.spec(chain()), align.spec(chain(9))]
    with pytest.raises(AdamergeError, match="2 specs and 1 modules were given for 2 networks"):
        align.ot_fusion(specs, states, modules=[chain()])
    with pytest.raises(AdamergeError, match="groups of network 1 are not those of network 0"):
        align.ot_fusion([specs[0], align.Spec({})], states)
    inputs = {**states[1], "0.weight": torch.zeros(9, 5)}
    with pytest.raises(AdamergeError, match=r"'0.weight' is \[9, 5\].*\[8, 3\].*axis 0"):
        align.ot_fusion(specs, [states[0], inputs])
    readers = align.Spec({"h": align.Group(8, (align.Place("2.weight", 1, reads=True),))})
    with pytest.raises(AdamergeError, match="units of group 'h' are made by no tensor"):
        align.ot_fusion(readers, [states[0], states[0]])
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(AdamergeError, match="pip install POT"):
        align.ot_fusion(specs, states)


def interpolated(build: object, one: nn.Module, two: nn.Module) -> nn.Module:
    middle = copy.deepcopy(one)
    middle.load_state_dict(align.uniform([one.state_dict(), two.state_dict()]))
    return middle


def test_repair_gives_units_the_interpolated_statistics() -> None:
    torch.manual_seed(0)
    one, two = deep(3, 8, 7, 2), deep(3, 8, 7, 2)
    middle = interpolated(deep, one, two)
    before = copy.deepcopy(middle.state_dict())
    batches = [torch.randn(n, 3, dtype=torch.float64) for n in (30, 50)]
    mended = align.repair(align.spec(middle), middle, [one, two], batches, [0.25, 0.75])
    x = torch.cat(batches)
    for layer in (1, 3):  # what the next layer was given, less its activation function
        a, b, c = (network[:layer](x) for network in (one, two, mended))
        torch.testing.assert_close(c.mean(0), 0.25 * a.mean(0) + 0.75 * b.mean(0))
        wanted = 0.25 * a.std(0, correction=0) + 0.75 * b.std(0, correction=0)
        torch.testing.assert_close(c.std(0, correction=0), wanted)
    assert all(torch.equal(before[key], tensor) for key, tensor in middle.state_dict().items())
    torch.testing.assert_close(mended[4].weight, middle[4].weight)  # the last layer is as it was


def test_repair_computes_statistics_of_batch_norm_anew() -> None:
    one, two = (filled(lambda: Residual(nn.BatchNorm2d), seed) for seed in (0, 1))
    middle = interpolated(None, one, two)
    batches = [torch.randn(6, 1, 8, 8, dtype=torch.float64) for _ in range(3)]
    mended = align.repair(align.spec(middle), middle, [one, two], batches)
    seen: dict[str, list[Tensor]] = {}
    norms = {n: m for n, m in mended.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 7
    for name, norm in norms.items():
        norm.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0])
        )
    for batch in batches:
        mended(batch)
    for name, norm in norms.items():
        values = torch.cat(seen[name]).transpose(0, 1).flatten(1)
        torch.testing.assert_close(norm.running_mean, values.mean(1))
        torch.testing.assert_close(norm.running_var, values.var(1, correction=0))


def test_a_unit_that_never_changes_stays_finite() -> None:
    one, two = deep(3, 4, 2), deep(3, 4, 2)
    middle = interpolated(deep, one, two)
    middle[0].weight[1] = 0
    mended = align.repair(align.spec(middle), middle, [one, two], [torch.randn(9, 3).double()])
    assert all(bool(tensor.isfinite().all()) for tensor in mended.state_dict().values())


def test_repair_names_mistakes() -> None:
    spec = align.spec(chain())
    for endpoints, batches, shares in (
        ([chain()], [], None),
        ([], [1], None),
        ([chain()], [1], []),
    ):
        with pytest.raises(AdamergeError, match="at least one batch, and one share for each"):
            align.repair(spec, chain(), endpoints, batches, shares)


@pytest.mark.parametrize("name", ["mlp", "resnet batchnorm", "resnet layernorm", "flattening"])
def test_a_network_zipped_with_its_copy_is_itself(name: str) -> None:
    build, inputs, _ = NETWORKS[name]
    one, two = filled(build), filled(build)
    spec = align.spec(one)
    two.load_state_dict(align.apply(spec, align.drawn(spec, 1), one.state_dict()))
    batch = inputs()
    zipped = align.zipit(spec, (one.state_dict(), two.state_dict()), (one, two), [batch])
    for state in zipped:
        found = build().double().eval()
        found.load_state_dict(state)
        torch.testing.assert_close(found(batch), one(batch), atol=1e-9, rtol=1e-9)


def test_features_are_zipped_within_a_network() -> None:
    """Each network has every unit twice and shares none: both functions are kept."""
    torch.manual_seed(0)
    one, two = doubled(deep(3, 4, 2)), doubled(deep(3, 4, 2))
    x = torch.randn(60, 3, dtype=torch.float64)
    states = one.state_dict(), two.state_dict()
    zipped = align.zipit(align.spec(one), states, (one, two), [x[:30], x[30:]])
    assert zipped[0]["0.weight"] is zipped[1]["0.weight"]
    for network, state in zip((one, two), zipped, strict=True):
        found = deep(3, 8, 2)
        found.load_state_dict(state)
        torch.testing.assert_close(found(x), network(x), atol=1e-9, rtol=1e-9)


def test_zipping_up_to_a_layer_leaves_the_rest_apart() -> None:
    torch.manual_seed(0)
    one, two = deep(3, 6, 5, 2), deep(3, 6, 5, 2)
    states, x = (one.state_dict(), two.state_dict()), torch.randn(40, 3, dtype=torch.float64)
    spec = align.spec(one)
    zipped = align.zipit(spec, states, (one, two), [x], groups=["0"])
    shared = {name for name in zipped[0] if zipped[0][name] is zipped[1][name]}
    assert shared == {"0.weight", "0.bias"}
    for network, before in zip(zipped, states, strict=True):
        for name in ("2.bias", "4.weight", "4.bias"):
            assert torch.equal(network[name], before[name])
    # Every unit of either network reads the mean of a pair, itself among the two.
    for index, network in enumerate((one, two)):
        torch.testing.assert_close(zipped[index]["2.weight"].sum(1), network[2].weight.sum(1))
    with pytest.raises(AdamergeError, match=r"'2.weight' would be shared, and its axis 1 .* '0'"):
        align.zipit(spec, states, (one, two), [x], groups=["2"])
    with pytest.raises(AdamergeError, match="the group '9', which the spec has not"):
        align.zipit(spec, states, (one, two), [x], groups=["9"])


def test_soups() -> None:
    states = [{"w": torch.tensor([float(v)]), "n": torch.tensor(v)} for v in (0, 1, 3, 2)]
    assert align.uniform(states)["w"] == 1.5 and align.uniform(states)["n"] == 0
    scores: list[float] = []

    def score(state: dict[str, Tensor]) -> float:
        scores.append(float(state["w"]))
        return -abs(float(state["w"]) - 2.6)

    soup, kept = align.greedy(states, score)
    # Alone 3 is best, then 2, 1, 0; 3 and 2 give 2.5, better; with 1 or 0 it falls.
    assert kept == [2, 3] and soup["w"] == 2.5
    assert scores == [0, 1, 3, 2, 2.5, 2, pytest.approx(5 / 3)]
    assert align.greedy(states[:1], score)[1] == [0]
    equal, everyone = align.greedy(states, lambda state: 1.0)
    assert everyone == [0, 1, 2, 3] and equal["w"] == 1.5  # kept where it does not fall


def test_soups_name_mistakes() -> None:
    state = {"w": torch.zeros(2)}
    for states, message in (
        ([], "at least one"),
        ([state, {"w": torch.zeros(3)}], r"'w' is \[3\] in network 1, \[2\] in network 0"),
        ([state, {**state, "v": torch.zeros(3)}], "'v' is .* network 1, missing in network 0"),
    ):
        with pytest.raises(AdamergeError, match=message):
            align.uniform(states)
    with pytest.raises(AdamergeError, match="2 shares were given for 1"):
        align.average([state], [0.5, 0.5])
    with pytest.raises(AdamergeError, match="score of network 0 is NaN"):
        align.greedy([state], lambda _: math.nan)
    with pytest.raises(AdamergeError, match="protocol paper the images it would choose"):
        align.greedy([state], lambda _: 1.0, protocol="paper")
    with pytest.raises(AdamergeError, match="at least one"):
        align.greedy([], lambda _: 0.0)


def test_the_example_of_soups_runs() -> None:
    path = Path(__file__).parent.parent / "examples" / "soup.py"
    found = runpy.run_path(str(path))["main"]()
    pretrained, best, uniform, greedy = found.values()
    assert list(found)[2] == "uniform soup" and list(found)[3].startswith("greedy soup of ")
    assert min(best, uniform, greedy) > pretrained + 0.1
