"""AdaRank against plain autograd, from every storage; the reference numbers are elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamerge import AdamergeError, TaskVectors
from adamerge.methods import AdaRank
from adamerge.transforms import centre, truncate
from adamerge.weights.storage import Storage
from tests import golden_data as golden


class Linear(nn.Module):
    """A tower of a tall, a wide and a loose matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 4)])
        self.proj = nn.Parameter(torch.randn(4, 2))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.blocks[1](torch.relu(self.blocks[0](images.mean((2, 3)))))
        return hidden @ self.proj


def task_vectors(network: nn.Module, dtype: torch.dtype = torch.float64) -> TaskVectors:
    generator = torch.Generator().manual_seed(0)
    pretrained = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    experts = {
        task: {
            name: tensor + torch.randn(tensor.shape, generator=generator).to(dtype)
            for name, tensor in pretrained.items()
        }
        for task in ("a", "b")
    }
    return TaskVectors(pretrained, experts)


def test_weights_and_gradients_are_those_of_plain_sums() -> None:
    network = Linear().double()
    vectors = task_vectors(network)
    method = AdaRank(network, vectors, init=0.4, rank=0.7, temperature=2.0)
    with torch.no_grad():
        for scores in method.scores:
            scores.add_(torch.linspace(-0.15, 0.15, scores.numel()).view_as(scores))
    coefficients = method.coefficients.detach().clone().requires_grad_()
    chances, merged = [], {}
    for column, name in enumerate(vectors.names):
        total = vectors.pretrained[name]
        for row, tau in enumerate(vectors.deltas[name]):
            part = tau
            if name in method.matrices:
                scores = method.scores[method.matrices.index(name)][row].detach()
                chance = torch.sigmoid(scores / 2.0).requires_grad_()
                chances.append(chance)
                left, values, right = torch.linalg.svd(tau, full_matrices=False)
                gate = (scores > 0).double() + chance - chance.detach()
                part = left @ torch.diag(gate * values) @ right
            total = total + coefficients[row, column] * part
        merged[name] = total
    assert method.matrices == ("blocks.0.weight", "blocks.1.weight")
    found = method.weights()
    pull = {name: torch.randn(tensor.shape).double() for name, tensor in merged.items()}
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor)
    sum((merged[n] * pull[n]).sum() for n in merged).backward()
    sum((found[n] * pull[n]).sum() for n in merged).backward()
    torch.testing.assert_close(method.coefficients.grad, coefficients.grad)
    grads = [row for scores in method.scores for row in scores.grad]
    probabilities = [torch.sigmoid(row / 2.0) for scores in method.scores for row in scores]
    for grad, chance, p in zip(grads, chances, probabilities, strict=True):
        torch.testing.assert_close(grad, chance.grad * (p * (1 - p)).detach() / 2.0)


def test_with_all_components_it_is_task_arithmetic_and_with_few_truncation() -> None:
    network = Linear().double()
    vectors = task_vectors(network)
    whole, cut = AdaRank(network, vectors), AdaRank(network, vectors, rank=0.7)
    few = truncate(vectors, 0.7)
    for name, base in vectors.pretrained.items():
        arithmetic = base + 0.3 * vectors.deltas[name].sum(0)
        torch.testing.assert_close(whole.weights()[name], arithmetic)
        torch.testing.assert_close(cut.weights()[name], base + 0.3 * few.deltas[name].sum(0))
    assert whole.merged_components().tolist() == [7, 7]
    assert cut.merged_components().tolist() == [4, 4]


@pytest.mark.parametrize("place", ["auto", "disk"])
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("int8", 2e-2)])
def test_components_are_kept_as_the_task_vectors_are(
    dtype: str, bound: float, place: str, tmp_path: Path
) -> None:
    plain = golden.task_vectors(torch.float32)
    kept = plain.stored(Storage(dtype, place, tmp_path / "t.safetensors"))
    one, other = (AdaRank(golden.clip().backbone, vectors) for vectors in (plain, kept))
    assert other.task_vectors.storage.dtype == dtype
    images, ids = golden.batch(0, torch.float32)
    exact, near = one(images, ids), other(images, ids)
    assert 0 < (near - exact).norm() < bound * exact.norm()
    near.square().sum().backward()
    exact.square().sum().backward()
    wanted, found = one.coefficients.grad, other.coefficients.grad
    assert wanted is not None and found is not None
    assert (found - wanted).norm() < 5 * bound * wanted.norm()


def test_one_score_below_zero_takes_one_component_away() -> None:
    vectors = centre(golden.task_vectors())
    method = AdaRank(golden.clip().backbone, vectors, init=1.0)
    name = method.matrices[1]
    before = method.weights()[name].detach()
    with torch.no_grad():
        method.scores[1][2, 4] = -1e-9
    left, values, right = torch.linalg.svd(vectors.deltas[name][2])
    gone = values[4] * torch.outer(left[:, 4], right[4])
    torch.testing.assert_close(method.weights()[name].detach(), before - gone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 1.5}, r"AdaRank: rank is 1.5, expected a number in \[0, 1\]"),
        ({"rank": "abc"}, r"AdaRank: rank is 'abc', expected a number in"),
        ({"score": 0.0}, r"AdaRank: score is 0.0, expected a number in \(0, 1e\+06\]"),
        ({"temperature": -1.0}, r"AdaRank: temperature is -1.0, expected a number in \(0,"),
        ({"temperature": float("nan")}, "AdaRank: temperature is nan, expected"),
        ({"init": float("nan")}, "AdaRank: init is nan, expected a number"),
        ({"init": float("inf")}, "AdaRank: init is inf, expected a number"),
        ({"layers": "all"}, "layers is 'all': expected 'matrices' or 'blocks'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdamergeError, match=message):
        AdaRank(golden.clip().backbone, golden.task_vectors(), **settings)
