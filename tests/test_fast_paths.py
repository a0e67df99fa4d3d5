"""The faster forms of a tower's parts compute what the plain ones do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from adamerge.encoders import fast_paths
from adamerge.encoders.fast_paths import (
    OpenAttention,
    PatchProduct,
    attention_for,
    use_fast_paths,
)
from adamerge.encoders.tower import Tower, resblocks, tapped
from adamerge.encoders.walk import seeing
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
    use_fast_paths(conv)
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
    use_fast_paths(conv)
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


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_towers_attention_computes_the_same_and_its_projections_are_seen(
    batch_first: bool,
) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first).double().eval()
    own = copy.deepcopy(plain)
    use_fast_paths(own)
    assert type(own) is OpenAttention
    tokens = torch.randn(3, 5, 8, dtype=torch.float64)
    count = tokens.shape[1 if batch_first else 0]
    mask = torch.randn(count, count, dtype=torch.float64)
    causal = torch.ones(count, count).triu(1).bool()
    seen: list[str] = []
    with seeing(own, lambda name, given: seen.append(name)):
        for options in (
            {"need_weights": False},
            {"need_weights": False, "attn_mask": mask},
            {"attn_mask": mask},
            {"average_attn_weights": False},
        ):
            found = own(tokens, tokens, tokens, **options)
            torch.testing.assert_close(found, plain(tokens, tokens, tokens, **options))
    assert seen == ["in_proj_weight", "out_proj.weight"] * 4
    other = torch.randn_like(tokens)
    for key, options in ((other, {}), (tokens, {"attn_mask": causal})):  # left to torch
        found = own(tokens, key, key, need_weights=False, **options)
        torch.testing.assert_close(found, plain(tokens, key, key, need_weights=False, **options))


def flops(compute: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


def test_the_last_block_computes_the_pooled_token_alone_unless_it_is_watched() -> None:
    backbone = golden.clip().backbone
    images = golden.batch(0, torch.float64)[0]
    state = golden.state("pretrained", torch.float64)
    tower = Tower(backbone)
    wanted, found = ({n: t.clone().requires_grad_() for n, t in state.items()} for _ in range(2))
    expected, features = functional_call(backbone, wanted, (images,)), tower(found, images)
    torch.testing.assert_close(features, expected)
    for given in (expected, features):
        given.square().sum().backward()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].grad, tensor.grad)
    seen: list[Tensor] = []
    with tapped(resblocks(tower.skeleton)[-1:], lambda index, output: seen.append(output)):
        torch.testing.assert_close(tower(state, images), expected)
        whole = flops(lambda: tower(state, images))
    assert seen[0].shape[1] == len(state["positional_embedding"])
    assert flops(lambda: tower(state, images)) < whole


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_a_backbone_that_checkpoints_gives_the_same_gradients(pool: str) -> None:
    vision = open_clip.CLIPVisionCfg(image_size=16, patch_size=8, width=32, layers=2, head_width=16)
    vision.pool_type = pool
    backbone = open_clip.model._build_vision_tower(16, vision).eval()
    images, found = torch.randn(2, 3, 16, 16), []
    for checkpoints in (False, True):
        backbone.set_grad_checkpointing(checkpoints)
        state = {n: t.detach().clone().requires_grad_() for n, t in backbone.named_parameters()}
        Tower(backbone)(state, images).square().sum().backward()
        found.append({name: tensor.grad for name, tensor in state.items()})
    torch.testing.assert_close(found[0], found[1])
    assert backbone.transformer.grad_checkpointing  # it is left as it was


def test_a_tower_that_pools_all_tokens_keeps_its_last_block() -> None:
    vision = open_clip.CLIPVisionCfg(image_size=16, patch_size=8, width=32, layers=2, head_width=16)
    vision.pool_type = "avg"
    backbone = open_clip.model._build_vision_tower(16, vision).eval()
    images = torch.randn(2, 3, 16, 16)
    tower = Tower(backbone)
    assert type(tower.skeleton.transformer) is type(backbone.transformer)
    torch.testing.assert_close(tower(backbone.state_dict(), images), backbone(images))
