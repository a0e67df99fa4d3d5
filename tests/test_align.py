"""Symmetries of networks: derived from modules, applied without a change of the function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ViTConfig,
    ViTModel,
)

from adamerge import align

Inputs = Callable[[], Tensor]


class Residual(nn.Module):
    """A small residual network; `norm` makes the norm of so many channels."""

    def __init__(self, norm: Callable[[int], nn.Module], bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=bias)
        self.norm = norm(6)
        self.blocks = nn.ModuleList(Block(a, b, norm, bias) for a, b in ((6, 6), (6, 8), (8, 8)))
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, a: int, b: int, norm: Callable[[int], nn.Module], bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, padding=1, bias=bias)
        self.norm1, self.norm2 = norm(b), norm(b)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1, bias=bias)
        self.shortcut = nn.Identity() if a == b else nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ChannelsLast(nn.Module):
    """A LayerNorm of the channels, where they come second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Flattening(nn.Module):
    """A convolution, its channels gated by their own mean, flattened and read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(1, 5, 3), nn.Linear(5, 5)
        self.norm, self.head = nn.LayerNorm([5, 6, 6]), nn.Linear(5 * 36, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return self.head(torch.relu(x).flatten(1))


def mlp() -> nn.Module:
    parts = [nn.Linear(64, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 7, bias=False)]
    return nn.Sequential(nn.Flatten(), *parts, nn.LayerNorm(7), nn.PReLU(7), nn.Linear(7, 3))


def vit() -> nn.Module:
    return VisionTransformer(8, 4, 16, 2, 4, 2.0, ls_init_value=0.5, output_dim=6)


def torch_encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)


def bert_config() -> BertConfig:
    return BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        vocab_size=30,
        max_position_embeddings=10,
    )


def clip() -> nn.Module:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
    return CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, num_channels=1, **sizes)
    )


def hf_vit() -> nn.Module:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
    return ViTModel(ViTConfig(hidden_size=16, image_size=8, patch_size=4, num_channels=1, **sizes))


def images() -> Tensor:
    return torch.randn(4, 1, 8, 8, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(0, 30, (3, 8))


def words() -> Tensor:
    return torch.randn(3, 5, 8, dtype=torch.float64)


def rgb8() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64)


def rgb() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Inputs, int]] = {  # and how many groups
    "mlp": (mlp, images, 2),
    "resnet batchnorm": (lambda: Residual(nn.BatchNorm2d), images, 5),
    "resnet layernorm": (lambda: Residual(ChannelsLast, bias=True), images, 5),
    "resnet groupnorm": (lambda: Residual(lambda n: nn.GroupNorm(1, n), bias=True), images, 5),
    "resnet plain": (lambda: Residual(lambda _: nn.Identity(), bias=True), images, 5),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=4), rgb, 12),
    "flattening": (Flattening, images, 1),
    "open_clip vit": (vit, rgb8, 5),
    "torch encoder layer": (torch_encoder, words, 2),
    "bert": (lambda: BertModel(bert_config()), tokens, 4),
    "bert classifier": (lambda: BertForSequenceClassification(bert_config()), tokens, 5),
    "transformers clip": (clip, images, 4),
    "transformers vit": (hf_vit, images, 4),
}


def filled(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in float64 whose every tensor is random, statistics and scales among them."""
    torch.manual_seed(seed)
    module = build().double().eval().requires_grad_(False)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor += 0.3 * torch.randn_like(tensor)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.1)
    return module


def outputs(module: nn.Module, inputs: Tensor) -> list[Tensor]:
    """All tensors that a network returns."""
    found = module(inputs)
    return [found] if isinstance(found, Tensor) else [t for t in found.values() if t is not None]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_network_is_the_same_function(name: str) -> None:
    build, inputs, count = NETWORKS[name]
    module = filled(build)
    spec = align.spec(module)
    assert len(spec.groups) == count, list(spec.groups)
    state, batch = module.state_dict(), inputs()
    before = outputs(module, batch)
    for group in [None, *spec.groups]:  # all at once, and one by one
        orders = align.drawn(spec, 1)
        orders = orders if group is None else {group: orders[group]}
        moved = align.apply(spec, orders, state)
        assert any(not torch.equal(moved[key], state[key]) for key in state)
        other = build().double().eval()
        other.load_state_dict(moved)
        for old, new in zip(before, outputs(other, batch), strict=True):
            torch.testing.assert_close(new, old, atol=1e-9, rtol=1e-9)
