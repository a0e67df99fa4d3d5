"""Buffers are not layers, and a tower may give its tokens beside its features."""

from __future__ import annotations

import copy
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from adamerge import AdamergeError, TaskVectors
from adamerge.encoders.experts import Experts
from adamerge.encoders.tower import Tower, merged_encoder, static_encoder
from adamerge.methods import AdaMerging
from adamerge.transforms.sparse import ties
from adamerge.weights.storage import Storage

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([0, 1, 0, 1])


def clip_resnet() -> nn.Module:
    return open_clip.modified_resnet.ModifiedResNet([1, 1, 1, 1], 16, 4, image_size=32, width=8)


def timm_resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=16)


TOWERS = {"clip": clip_resnet, "timm": timm_resnet}


def tuned(model: nn.Module, seed: int) -> nn.Module:
    """Other weights, and the statistics of other images."""
    torch.manual_seed(seed)
    found = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        found.train()(3 * torch.randn(8, 3, 32, 32) + seed)
    return found.eval()


def world(
    name: str, storage: Storage | None = None
) -> tuple[nn.Module, list[nn.Module], TaskVectors]:
    torch.manual_seed(0)
    model = TOWERS[name]().eval().requires_grad_(False)
    experts = [tuned(model, 1), tuned(model, 2)]
    states = {task: e.state_dict() for task, e in zip("ab", experts, strict=True)}
    return model, experts, TaskVectors(model.state_dict(), states, storage=storage)


@pytest.mark.parametrize("name", TOWERS)
def test_statistics_are_merged_outside_the_coefficients(name: str) -> None:
    model, experts, vectors = world(name)
    parameters = {key for key, _ in model.named_parameters()}
    assert set(vectors.names) == parameters
    for key, tensor in vectors.constants.items():
        values = [expert.state_dict()[key] for expert in experts]
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (values[0] + values[1]) / 2)
        else:
            assert torch.equal(tensor, model.state_dict()[key])
    for coefficients in (0.0, 0.3, 5.0, -2.0):
        state = merged_encoder(Tower(model), vectors, coefficients).backbone.state_dict()
        for key, tensor in state.items():
            assert not key.endswith("running_var") or bool((tensor >= 0).all())


@pytest.mark.parametrize("name", TOWERS)
def test_models_keep_their_own_statistics(name: str) -> None:
    model, experts, vectors = world(name)
    tower = Tower(model)
    with torch.no_grad():
        wanted = [expert(IMAGES) for expert in experts]
        torch.testing.assert_close(static_encoder(tower, vectors, None)(IMAGES), model(IMAGES))
        for task, features in zip("ab", wanted, strict=True):
            found = static_encoder(tower, vectors, task)(IMAGES)
            torch.testing.assert_close(found, features, atol=1e-4, rtol=1e-4)
        found = Experts(model, vectors)(IMAGES, IDS)
    rows = torch.stack([wanted[task][row] for row, task in enumerate(IDS.tolist())])
    torch.testing.assert_close(found, rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["task", "layer", "block"])
@pytest.mark.parametrize("name", TOWERS)
def test_coefficients_of_a_resnet_are_learned_and_folded(name: str, granularity: str) -> None:
    model, _, vectors = world(name)
    method = AdaMerging(model, ties(vectors, 0.5), granularity)  # type: ignore[arg-type]
    before = {key: tensor.clone() for key, tensor in vectors.constants.items()}
    method(IMAGES, IDS).square().sum().backward()
    gradient = method.coefficients.grad
    assert gradient is not None and bool(gradient.isfinite().all() and gradient.any())
    with torch.no_grad():
        method.coefficients -= 1e-4 * gradient
        torch.testing.assert_close(method.fold()(IMAGES), method(IMAGES, IDS))
    assert all(torch.equal(vectors.constants[key], t) for key, t in before.items())


def test_buffers_of_task_vectors_on_disk(tmp_path: Path) -> None:
    storage = Storage("float32", "disk", tmp_path / "tau.safetensors")
    model, experts, vectors = world("clip", storage)
    states = {task: e.state_dict() for task, e in zip("ab", experts, strict=True)}
    again = TaskVectors.mapped(model.state_dict(), storage, states)
    assert set(again.constants) == set(vectors.constants)
    assert all(torch.equal(again.constants[key], t) for key, t in vectors.constants.items())
    assert all(torch.equal(again.expert("b")[key], t) for key, t in vectors.expert("b").items())
    with pytest.raises(AdamergeError, match="no experts were given"):
        TaskVectors.mapped(model.state_dict(), storage)


def test_buffers_known_by_name() -> None:
    """What a tower names, beside batch norm's; with half-precision experts."""
    state = {
        "w": torch.ones(2, 2),
        "table": torch.ones(2),
        "num_batches_tracked": torch.tensor(3),
    }
    expert = {
        "w": torch.zeros(2, 2),
        "table": torch.zeros(2),
        "num_batches_tracked": torch.tensor(9),
    }
    other = {**expert, "w": -state["w"], "table": torch.ones(2).half()}
    vectors = TaskVectors(state, {"a": expert, "b": other}, buffers=["table"])
    assert vectors.names == ("w",)
    assert torch.equal(vectors.constants["table"], torch.full((2,), 0.5))
    assert int(vectors.constants["num_batches_tracked"]) == 3
    moved = vectors.apply(lambda tensor: tensor.double())
    assert moved.expert("a")["table"].dtype == torch.float64
    with pytest.raises(AdamergeError, match=r"'b'.*'table' of shape \[3\]"):
        TaskVectors(state, {"a": expert, "b": {**other, "table": torch.ones(3)}}, buffers=["table"])
    with pytest.raises(AdamergeError, match=r"'b'.*NaN or infinite values in tensor 'table'"):
        bad = {**other, "table": torch.tensor([1.0, float("nan")])}
        TaskVectors(state, {"a": expert, "b": bad}, buffers=["table"])


class Pair(nn.Module):
    """A tower that gives its tokens beside its features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.linear(images.flatten(2).unflatten(2, (-1, 4)).transpose(1, 2).flatten(2))
        return tokens.mean(1), tokens


def test_towers_that_give_a_pair() -> None:
    images, model = torch.randn(4, 3, 4, 4), Pair()
    states = {t: {n: w + i for n, w in model.state_dict().items()} for i, t in enumerate("ab", 1)}
    vectors = TaskVectors(model.state_dict(), states)
    method = AdaMerging(model, vectors)
    features = method(images, IDS)
    assert features.shape == (4, 5)
    features.sum().backward()
    assert method.coefficients.grad is not None and bool(method.coefficients.grad.any())
    torch.testing.assert_close(method.fold()(images), features)
    assert Experts(model, vectors)(images, IDS).shape == (4, 5)
