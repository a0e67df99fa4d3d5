"""The faster forms of a tower's parts compute what the plain ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

from adamerge.encoders import fast_paths
from adamerge.encoders.fast_paths import PatchProduct, attention_for, use_patch_products
from adamerge.encoders.tower import Tower
from tests import golden_data as golden


@pytest.mark.parametrize("size", [(8, 8), (4, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_patches_as_a_product_are_the_convolution(size: tuple[int, int], bias: bool) -> None:
    conv = nn.Conv2d(3, 5, size, stride=size, bias=bias, dtype=torch.float64)
    images = torch.randn(2, 3, 33, 30, dtype=torch.float64)  # with something left at the edges
    expected = conv(images)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    wanted = [parameter.grad for parameter in conv.parameters()]
    conv.zero_grad()
    use_patch_products(conv)
    assert type(conv) is PatchProduct
    found = conv(images)
    torch.testing.assert_close(found, expected)
    found.backward(grad)
    torch.testing.assert_close([parameter.grad for parameter in conv.parameters()], wanted)


@pytest.mark.parametrize(
    "other",
    [
        {"kernel_size": 4, "stride": 2},
        {"kernel_size": 4, "stride": 4, "padding": 1},
        {"kernel_size": 2, "stride": 2, "dilation": 2},
        {"kernel_size": 2, "stride": 2, "groups": 3},
        {"kernel_size": 1, "stride": 1},
    ],
)
def test_other_convolutions_are_left_alone(other: dict) -> None:
    conv = nn.Conv2d(3, 6, **other)
    use_patch_products(conv)
    assert type(conv) is nn.Conv2d


def test_a_tower_cuts_its_patches_so_and_its_backbone_does_not() -> None:
    backbone = golden.clip().backbone
    tower = Tower(backbone)
    assert type(tower.skeleton.conv1) is PatchProduct
    assert type(backbone.conv1) is nn.Conv2d
    images = golden.batch(0, torch.float32)[0]
    torch.testing.assert_close(tower(backbone.state_dict(), images), backbone(images))


def test_attention_is_chosen_for_few_tokens_in_half_precision_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[SDPBackend] = []
    plain = fast_paths.sdpa_kernel
    monkeypatch.setattr(fast_paths, "sdpa_kernel", lambda b: (chosen.append(b), plain(b))[1])
    tower = Tower(golden.clip().backbone).skeleton
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for device, low in ((cpu, False), (gpu, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            attention_for(tower, device)
    assert chosen == []
    with torch.autocast("cpu", torch.bfloat16), attention_for(tower, cpu):
        assert chosen == [SDPBackend.MATH]
    monkeypatch.setattr(fast_paths, "_FEW_TOKENS", 2)
    with torch.autocast("cpu", torch.bfloat16):
        attention_for(tower, cpu)
    assert len(chosen) == 1
