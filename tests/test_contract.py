"""What holds for every method: one table, one row per method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adamerge
from adamerge.encoders.tower import Tower, merged_encoder
from adamerge.learn.step import step_loss
from adamerge.methods import (
    AdaMerging,
    AdaRank,
    Concrete,
    MergeMethod,
    Pareto,
    Surgery,
    WEMoE,
)
from adamerge.transforms import centre, emr, tall, ties
from adamerge.weights.merging import Merge
from tests import golden_data as golden

Make = Callable[[nn.Module, adamerge.TaskVectors], MergeMethod]
METHODS: dict[str, Make] = {
    "layer_wise": lambda b, tv: AdaMerging(b, tv, granularity="layer"),
    "task_wise": lambda b, tv: AdaMerging(b, tv, granularity="task"),
    "block_wise": lambda b, tv: AdaMerging(b, tv, granularity="block"),
    "partition": lambda b, tv: AdaMerging(b, tv, granularity="partition", parts=4),
    "element": lambda b, tv: AdaMerging(b, tv, granularity="element"),
    "layer_wise_clamped": lambda b, tv: AdaMerging(b, tv, granularity="layer", clamp=True),
    "layer_wise_pp": lambda b, tv: AdaMerging(b, ties(tv), granularity="layer"),
    "emr, an encoder per task": lambda b, tv: AdaMerging(b, emr(tv), "layer", 0.7),
    "tall, an encoder per task": lambda b, tv: AdaMerging(b, tall(tv), "task", clamp=True),
    "adarank": lambda b, tv: AdaRank(b, tv),
    "adarank, centred": lambda b, tv: AdaRank(b, centre(tv), init=1.5, rank=0.16),
    "concrete": lambda b, tv: Concrete(b, tv),
    "concrete, per task": lambda b, tv: Concrete(b, tv, granularity="task"),
    "concrete, fixed": lambda b, tv: Concrete(b, tv, granularity="fixed"),
    "pareto": lambda b, tv: Pareto(b, tv),
    "pareto, one task first": lambda b, tv: Pareto(b, tv, preference={tv.tasks[0]: 3.0}),
    "wemoe": lambda b, tv: WEMoE(b, tv),
    "wemoe_linear": lambda b, tv: WEMoE(b, tv, router_layers=1),
    "wemoe_constant": lambda b, tv: WEMoE(b, tv, router_layers=0),
    "e_wemoe": lambda b, tv: WEMoE(b, tv, shared_router=True, density=0.1),
    "surgery": lambda b, tv: Surgery(task_arithmetic(b, tv), tv.tasks, 16, rank=4),
    "surgery_v2": lambda b, tv: Surgery(task_arithmetic(b, tv), tv.tasks, 16, 4, "blocks"),
    "surgery_on_wemoe": lambda b, tv: Surgery(WEMoE(b, tv).fold(), tv.tasks, 16, 4, "blocks"),
}
every_method = pytest.mark.parametrize("name", METHODS)


def task_arithmetic(backbone: nn.Module, vectors: adamerge.TaskVectors) -> nn.Module:
    return merged_encoder(Tower(backbone), vectors, 0.3)


def make(name: str, dtype: torch.dtype = torch.float64) -> MergeMethod:
    torch.manual_seed(0)
    return METHODS[name](golden.clip().backbone, golden.task_vectors(dtype))


def adapt(method: MergeMethod, steps: int, rate: float = 1e-2) -> list[float]:
    """A plain PyTorch loop; the losses."""
    dtype = next(method.parameters()).dtype
    objective = adamerge.objectives.Entropy(golden.heads(dtype))
    optimizer = torch.optim.Adam(method.parameters(), lr=rate)
    losses = []
    for step in range(steps):
        images, ids = golden.batch(step % 20, dtype)
        optimizer.zero_grad()
        loss = objective.weigh(objective(method(images, ids), ids))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_method
def test_fold_keeps_features(name: str) -> None:
    method = make(name)
    adapt(method, 3)
    images, ids = golden.batch(0)
    torch.testing.assert_close(method.fold()(images, ids), method(images, ids))


@every_method
def test_folding_twice_gives_the_same_and_nothing_to_learn(name: str) -> None:
    method = make(name)
    adapt(method, 2)
    images, ids = golden.batch(0)
    first, second = method.fold(), method.fold()
    assert torch.equal(first(images, ids), second(images, ids))
    assert not any(p.requires_grad for p in first.parameters())
    features = first(images, ids)
    adapt(method, 2)
    assert torch.equal(first(images, ids), features), "a folded encoder must not follow its method"


@every_method
def test_exactly_the_learnables_get_gradients(name: str) -> None:
    vectors = golden.task_vectors()
    method = METHODS[name](golden.clip().backbone, vectors)
    images, ids = golden.batch(0)
    adamerge.objectives.entropy(method(images, ids)).backward()
    assert all(p.requires_grad and p.grad is not None for p in method.parameters())
    assert set(method.state_dict()) == {name for name, _ in method.named_parameters()}
    assert not any(
        t.requires_grad for t in [*vectors.pretrained.values(), *vectors.deltas.values()]
    )


@every_method
def test_inputs_are_left_unchanged(name: str) -> None:
    backbone, vectors = golden.clip().backbone, golden.task_vectors()
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    deltas = {key: tensor.clone() for key, tensor in vectors.deltas.items()}
    adapt(METHODS[name](backbone, vectors), 2)
    assert all(torch.equal(t, before[k]) for k, t in backbone.state_dict().items())
    assert all(torch.equal(t, deltas[k]) for k, t in vectors.deltas.items())


@every_method
def test_a_few_steps_lower_the_objective(name: str) -> None:
    method = make(name)
    objective = adamerge.objectives.Entropy(golden.heads())
    images, ids = golden.batch(0)
    before = objective(method(images, ids), ids).sum()
    adapt(method, 10)
    assert objective(method(images, ids), ids).sum() < before


@every_method
@pytest.mark.parametrize(("objective", "micro_batch"), [("Entropy", 5), ("InfoMax", 4)])
def test_micro_batches_do_not_change_the_gradient(
    name: str, objective: str, micro_batch: int
) -> None:
    images, ids = golden.batch(0)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    results = []
    for size in (None, micro_batch):
        method = make(name)
        loss_of = getattr(adamerge.objectives, objective)(golden.heads())
        loss, values, features = step_loss(method, loss_of, images[order], ids[order], size)
        loss.backward()
        grads = [p.grad for p in method.parameters()]
        results.append((loss.detach(), values, features, *grads))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("name", [name for name in METHODS if "wise" in name])
@pytest.mark.parametrize("objective", ["Entropy", "InfoMax"])
def test_a_step_merges_once_contracts_once_and_bounds_its_batches(
    name: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"merge": 0, "contract": 0, "largest": 0}
    merge, contract, encode = Merge.forward, Merge.backward, Tower.__call__

    def counted_merge(*args: Any) -> Any:
        counts["merge"] += 1
        return merge(*args)

    def counted_contract(*args: Any) -> Any:
        counts["contract"] += 1
        return contract(*args)

    def watched(tower: Tower, weights: Any, images: torch.Tensor) -> Any:
        counts["largest"] = max(counts["largest"], len(images))
        return encode(tower, weights, images)

    monkeypatch.setattr(Merge, "forward", staticmethod(counted_merge))
    monkeypatch.setattr(Merge, "backward", staticmethod(counted_contract))
    monkeypatch.setattr(Tower, "__call__", watched)
    images, ids = golden.batch(0)
    loss_of = getattr(adamerge.objectives, objective)(golden.heads())
    for size in (None, 4):
        counts.update(merge=0, contract=0, largest=0)
        step_loss(make(name), loss_of, images, ids, size)[0].backward()
        assert counts == {"merge": 1, "contract": 1, "largest": size or len(ids)}


@every_method
def test_dtype_moves_take_the_task_vectors_along(name: str) -> None:
    method = make(name, torch.float32).double()
    images, ids = golden.batch(0)
    features = method(images, ids)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, make(name)(images, ids), rtol=1e-4, atol=1e-4)


@every_method
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_features_and_gradients(name: str) -> None:
    images, ids = golden.batch(0)
    grads = []
    for device in ("cpu", "cuda"):
        method = make(name).to(device)
        method(images.to(device), ids).sum().backward()
        grads.append([p.grad.cpu() for p in method.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[1], grads[0])


@every_method
def test_same_steps_same_bits(name: str) -> None:
    first, second = make(name, torch.float32), make(name, torch.float32)
    assert adapt(first, 4) == adapt(second, 4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@every_method
def test_learned_state_round_trips_and_is_small(name: str, tmp_path: Path) -> None:
    method = make(name)
    adapt(method, 2)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    learned = sum(parameter.nbytes for parameter in method.parameters())
    assert (tmp_path / "state.pt").stat().st_size < 60_000 + learned
    other = make(name)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    images, ids = golden.batch(0)
    assert torch.equal(other(images, ids), method(images, ids))


def test_the_loop_of_the_readme_fills_coefficients() -> None:
    vectors = golden.task_vectors(torch.float32)
    images, ids = golden.batch(0, torch.float32)
    for granularity, shape in (("task", (3,)), ("layer", (3, 32)), ("block", (3, 8))):
        method = AdaMerging(golden.clip().backbone, vectors, granularity=granularity)
        logits = golden.heads(torch.float32).logits(method(images, ids), "task_a")
        adamerge.objectives.entropy(logits).backward()
        assert method.coefficients.shape == shape
        assert method.coefficients.grad is not None and method.coefficients.grad.shape == shape


def test_block_wise_gradient_is_the_sum_over_its_layers() -> None:
    images, ids = golden.batch(0)
    grads = {}
    for granularity in ("layer", "block"):
        method = AdaMerging(golden.clip().backbone, golden.task_vectors(), granularity=granularity)
        method(images, ids).square().sum().backward()
        grads[granularity] = method.coefficients.grad
    names = golden.task_vectors().names
    inside = [i for i, name in enumerate(names) if name.startswith("transformer.resblocks.1.")]
    column = method.groups.index("transformer.resblocks.1")
    torch.testing.assert_close(grads["block"][:, column], grads["layer"][:, inside].sum(1))


def test_wrong_granularity_and_wrong_backbone() -> None:
    vectors = golden.task_vectors()
    with pytest.raises(adamerge.AdamergeError, match="granularity is 'channel': expected 'task'"):
        AdaMerging(golden.clip().backbone, vectors, granularity="channel")  # type: ignore[arg-type]
    with pytest.raises(adamerge.AdamergeError, match=r"tensor 'weight' is nothing.*\[2, 2\]"):
        AdaMerging(nn.Linear(2, 2), vectors)
