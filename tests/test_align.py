"""Symmetries of networks: derived from modules, applied without a change of the function."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ViTConfig,
    ViTModel,
)

from adamerge import AdamergeError, align
from adamerge.align import Group, Place, Spec

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


def beit() -> nn.Module:
    """Its attentions add a bias for each head, which no part of the table of names knows."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
    config = BeitConfig(hidden_size=16, image_size=8, patch_size=4, num_channels=1, **sizes)
    config.use_relative_position_bias = True
    return BeitForImageClassification(config)


def images() -> Tensor:
    return torch.randn(4, 1, 8, 8, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(0, 30, (3, 8))


def words() -> Tensor:
    return torch.randn(3, 5, 8, dtype=torch.float64)


def rgb8() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64)


def rgb() -> Tensor:
    return torch.randn(2, 3, 16, 16, dtype=torch.float64)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Inputs, int]] = {  # and how many groups
    "mlp": (mlp, images, 2),
    "resnet batchnorm": (lambda: Residual(nn.BatchNorm2d), images, 5),
    "resnet layernorm": (lambda: Residual(ChannelsLast, bias=True), images, 5),
    "resnet groupnorm": (lambda: Residual(lambda n: nn.GroupNorm(1, n), bias=True), images, 5),
    "resnet plain": (lambda: Residual(lambda _: nn.Identity(), bias=True), images, 5),
    "timm resnet": (lambda: timm.create_model("test_resnet", num_classes=4), rgb, 11),
    "flattening": (Flattening, images, 1),
    "open_clip vit": (vit, rgb8, 5),
    "torch encoder layer": (torch_encoder, words, 2),
    "bert": (lambda: BertModel(bert_config()), tokens, 4),
    "bert classifier": (lambda: BertForSequenceClassification(bert_config()), tokens, 5),
    "transformers clip": (clip, images, 4),
    "transformers vit": (hf_vit, images, 4),
    "transformers beit": (beit, images, 2),
    "timm efficientnet": (lambda: timm.create_model("test_efficientnet"), rgb, 13),
    "timm vit": (lambda: timm.create_model("test_vit", img_size=16), rgb, 13),
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
        if group is not None:
            orders = {group: torch.arange(spec.groups[group].units).roll(1)}
        moved = align.apply(spec, orders, state)
        assert any(not torch.equal(moved[key], state[key]) for key in state)
        other = build().double().eval()
        other.load_state_dict(moved)
        for old, new in zip(before, outputs(other, batch), strict=True):
            torch.testing.assert_close(new, old, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("module", ["derive", "matching", "restore", "soups", "symmetry"])
def test_examples(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"adamerge.align.{module}"))
    assert found.attempted and not found.failed


def test_a_resnet_has_a_group_for_each_stage_and_block() -> None:
    with torch.device("meta"):
        groups = align.spec(torchvision.models.resnet18()).groups
    assert len(groups) == 12 and groups["conv1"].units == 64
    assert groups["layer2.0.conv2"].places[-1].tensor == "layer3.0.downsample.0.weight"


def test_half_a_head_stays_in_its_head() -> None:
    """Whole heads move: their three blocks of rows together."""
    spec = align.spec(vit())
    heads = spec.groups["transformer.resblocks.0.attn.heads"]
    assert heads.units == 4 and heads.places[0].outer == 3
    state = {"transformer.resblocks.0.attn.in_proj_weight": torch.arange(48.0)[:, None]}
    one = Spec({"heads": Group(4, heads.places[:1])})
    moved = align.apply(one, {"heads": torch.tensor([1, 0, 2, 3])}, state)
    rows = next(iter(moved.values())).flatten().tolist()
    assert rows[:16] == [*range(4, 8), *range(4), *range(8, 16)]
    assert rows[16:32] == [row + 16 for row in rows[:16]]


class Unknown(nn.Module):
    """A network whose first layer's outputs are sorted, and whose second's are sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(3, 5)
        self.d = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).sort(-1).values)[:, :3]))


def test_units_that_meet_an_unknown_operation_stay() -> None:
    assert list(align.spec(Unknown()).groups) == ["c"]


def test_a_stream_that_is_returned_stays() -> None:
    tower = vit()
    assert "stream" in align.spec(tower).groups
    tower.output_tokens = True
    assert "stream" not in align.spec(tower).groups


class Choosing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


TABLE = {"hidden": {"0.weight": 0, "0.bias": 0, "2.weight": 1}}


def chain(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


def test_a_table_says_what_the_module_says() -> None:
    assert align.spec(chain(), TABLE).groups["hidden"] == align.spec(chain()).groups["0"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"h": {"0.weight": 2}}, "axis 2 of tensor '0.weight' .* does not exist.*\\[8, 3\\]"),
        ({"h": {"0.wait": 0}}, "no tensor '0.wait', of which group 'h' permutes axis 0"),
        ({"h": {"0.weight": 0, "2.weight": 0}}, "axis 0 of tensor '2.weight' .* has 2 entries"),
        ({"h": {"0.weight": 0}, "g": {"0.weight": 0}}, "axis 0 of .*'0.weight' .*'h' and 'g'"),
        ({"h": Group(3, (Place("0.weight", 0),))}, "has 8 entries .* multiple of 3 units"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table: Any, message: str) -> None:
    with pytest.raises(AdamergeError, match=message):
        align.spec(chain(), table)


def test_other_mistakes_are_named() -> None:
    spec = align.spec(chain())
    with pytest.raises(AdamergeError, match=r"Choosing cannot be recorded .*table"):
        align.spec(Choosing())
    with pytest.raises(AdamergeError, match=r"axis 0 of tensor '0.weight' .* has 9 entries"):
        align.apply(spec, {}, chain(9).state_dict())
    for orders, message in (
        ({"9": torch.arange(8)}, "a group '9'"),
        ({"0": torch.zeros(8, dtype=torch.long)}, "group '0' is not one of the numbers 0 to 7"),
    ):
        with pytest.raises(AdamergeError, match=message):
            align.apply(spec, orders, chain().state_dict())
