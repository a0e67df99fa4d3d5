"""A model is found by all of its names, and what does not fit is told as what it means."""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from adamerge import AdamergeError, TaskVectors
from adamerge.config.suite import suite_problems
from adamerge.encoders.clip import Clip, build_clip
from adamerge.encoders.model_configs import from_transformers
from adamerge.encoders.pretrained import load_pretrained
from adamerge.weights.formats.layouts import Layout, clip_to_transformers, tower_to_transformers
from adamerge.weights.formats.read import Checkpoint, tower_state
from tests import golden_data as golden

State = dict[str, Tensor]


def opened(state: State) -> Checkpoint:
    return Checkpoint("state.pt", Path("state.pt"), (Path("state.pt"),), state)


def backbone() -> nn.Module:
    return golden.clip().backbone


def whole() -> Clip:
    """A CLIP of its own, with other weights than any checkpoint below."""
    found = copy.deepcopy(golden.clip())
    for parameter in found.model.parameters():
        parameter.add_(1)
    return found


def clip_state() -> State:
    return {name: tensor.clone() for name, tensor in golden.clip().model.state_dict().items()}


def within(word: str, name: str) -> str:
    """The name with a word after the number of its block, as checkpointing puts it."""
    return re.sub(r"(resblocks|layers)\.0\.", rf"\1.0.{word}.", name)


WRAPPED: dict[str, Callable[[str], str]] = {
    "ddp": lambda n: f"module.{n}",
    "compiled": lambda n: f"_orig_mod.{n}",
    "online": lambda n: f"online_model.{n}",
    "any": lambda n: f"learner.clip_of_mine.{n}",
    "checkpointed blocks": lambda n: within("_checkpoint_wrapped_module", n),
    "fsdp": lambda n: f"_fsdp_wrapped_module.{within('_fsdp_wrapped_module', n)}",
    "all": lambda n: f"model._orig_mod.module.{within('_fsdp_wrapped_module._orig_mod', n)}",
}  # fmt: skip


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_wrappers_anywhere(wrapped: str, layout: str) -> None:
    rename, state = WRAPPED[wrapped], backbone().state_dict()
    theirs = dict(clip_to_transformers(clip_state()))
    given = clip_state() if layout == "open_clip" else theirs
    given = {rename(name): tensor for name, tensor in given.items()}
    for source in (given, {k: v for k, v in given.items() if "text" not in k}):
        found = tower_state(opened(source), backbone())
        assert list(found) == list(state)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    clip = whole()
    load_pretrained(clip, opened(given))
    assert all(torch.equal(clip.model.state_dict()[n], t) for n, t in clip_state().items())


@pytest.mark.parametrize("wrapped", ["ddp", "online", "all"])
def test_a_tower_alone_behind_wrappers(wrapped: str) -> None:
    state = {WRAPPED[wrapped](name): t for name, t in backbone().state_dict().items()}
    found = tower_state(opened(state), backbone())
    assert all(torch.equal(found[name], t) for name, t in backbone().state_dict().items())


def test_a_tower_beside_the_scale_of_logits() -> None:
    given = {**backbone().state_dict(), "logit_scale": torch.ones(()), "logit_bias": torch.ones(1)}
    found = tower_state(opened(given), backbone())
    assert list(found) == list(backbone().state_dict())


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ("online_model.", "ema_model.", r"online_model\., ema_model\."),
        ("", "visual.", r"one without a prefix, visual\."),
        ("model.visual.", "encoder.", r"model\.visual\., encoder\."),
    ],
)
@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_two_towers_are_named(one: str, other: str, told: str, layout: str) -> None:
    tower = backbone().state_dict()
    names = tower if layout == "open_clip" else dict(tower_to_transformers(tower))
    state = {f"{one}{name}": tensor for name, tensor in names.items()}
    changed = state | {f"{other}{name}": tensor + 1 for name, tensor in names.items()}
    told = told if layout == "open_clip" else ".*vision_model.*"
    with pytest.raises(AdamergeError, match=rf"2 image towers \({told}\)"):
        tower_state(opened(changed), backbone())
    twice = state | {f"{other}{name}": tensor for name, tensor in names.items()}
    found = tower_state(opened(twice), backbone())  # one tower that two attributes hold
    assert all(torch.equal(found[name], tensor) for name, tensor in tower.items())


# ---- what is missing, or too much -------------------------------------------------------------


def trained(keep: Callable[[str], bool], layout: str = "open_clip") -> State:
    state = {name: tensor + 1 for name, tensor in backbone().state_dict().items()}
    given = state if layout == "open_clip" else dict(tower_to_transformers(state))
    return {name: tensor for name, tensor in given.items() if keep(name)}


FROZEN = {
    "last block": (trained(lambda n: ".1." in n or n == "proj"), "lacks 19 of the tower's 32"),
    "all but one": (trained(lambda n: n != "conv1.weight"), "lacks 1 of the tower's 32"),
    "transformers": (trained(lambda n: "q_proj" in n, "transformers"), "lacks 36 of the tower"),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_tensors_left_out(name: str, caplog: pytest.LogCaptureFixture) -> None:
    state, message = FROZEN[name]
    with pytest.raises(AdamergeError, match=f"{message}.*, and has {len(state)}: .*missing: pretr"):
        tower_state(opened(state), backbone())
    caplog.set_level(logging.INFO, "adamerge")
    found, own = tower_state(opened(state), backbone(), fill=True), backbone().state_dict()
    assert list(found) == list(own) and "the pretrained ones are used" in caplog.text
    differ = {key for key in own if not torch.equal(found[key], own[key])}
    if name == "transformers":  # a third of q, k and v
        width = own["proj"].shape[0]
        assert differ == {key for key in own if "in_proj" in key}
        key = "transformer.resblocks.0.attn.in_proj_weight"
        torch.testing.assert_close(found[key][:width], own[key][:width] + 1)
        assert torch.equal(found[key][width:], own[key][width:])
    else:
        assert differ == set(state)


def test_frozen_visual_beside_a_whole_text_tower() -> None:
    """A text tower, whose blocks have the same names, is never taken for the image tower."""
    state = {n: t for n, t in clip_state().items() if not n.startswith("visual.") or ".1." in n}
    with pytest.raises(AdamergeError, match=r"lacks 20 of the tower's 32 tensors"):
        tower_state(opened(state), backbone())


@pytest.mark.parametrize("prefix", ["", "model.visual."])
@pytest.mark.parametrize("head", ["head", "fc", "classifier.mnist", "heads.0"])
def test_heads_are_left_out(prefix: str, head: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adamerge")
    state = dict(backbone().state_dict())
    extra = {f"{head}.weight": torch.ones(3, 16), f"{head}.bias": torch.ones(3)}
    given = {f"{prefix}{name}": tensor for name, tensor in {**state, **extra}.items()}
    assert list(tower_state(opened(given), backbone())) == list(state)
    assert f"{head}.weight, {head}.bias left out" in caplog.text


@pytest.mark.parametrize(
    "extra",
    [
        {"adapter.weight": torch.ones(3, 3)},
        {"prompt.table": torch.ones(3, 3)},
        {"stem.weight": torch.ones(3, 3, 2, 2)},
        {"transformer.resblocks.2.ln_1.weight": torch.ones(3)},
        {"proj_scale": torch.ones(1)},
    ],
)
def test_what_changes_the_tower_is_refused(extra: State) -> None:
    given = {**backbone().state_dict(), **extra}
    with pytest.raises(AdamergeError, match=rf"has 1 that it has not \({next(iter(extra))}\)"):
        tower_state(opened(given), backbone())


OTHERS = {
    "timm's vision transformer": timm.create_model("test_vit"),
    "a ResNet": timm.create_model("test_resnet"),
    "transformers' ViT or DINOv2": transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_are_named(kind: str) -> None:
    state = OTHERS[kind].state_dict()
    with pytest.raises(AdamergeError, match=f"no image tower of this architecture.*it is {kind}"):
        tower_state(opened(state), backbone())


def test_another_resolution() -> None:
    own = dict(backbone().state_dict())
    width = own["positional_embedding"].shape[1]
    larger = {**own, "positional_embedding": torch.ones(26, width)}
    expert = tower_state(opened(larger), backbone())
    with pytest.raises(AdamergeError, match=r"another resolution \(a grid of 5 x 5 against \d x"):
        TaskVectors(own, {"a": expert})
    clip, given = whole(), clip_state()
    given["visual.positional_embedding"] = torch.randn(26, width)
    wanted = dict(given)
    open_clip.model.resize_pos_embed(wanted, clip.model)
    load_pretrained(clip, opened(given))
    found = clip.model.state_dict()["visual.positional_embedding"]
    assert torch.equal(found, wanted["visual.positional_embedding"])
    given["visual.positional_embedding"] = torch.randn(27, width)  # of no grid
    with pytest.raises(AdamergeError, match=r"of shape \[27, "):
        load_pretrained(clip, opened(given))


def test_place_holders_of_a_sharded_training() -> None:
    own = dict(backbone().state_dict())
    with pytest.raises(AdamergeError, match=r"place-holder of a sharded training.*zero_to_fp32"):
        TaskVectors(own, {"a": {name: torch.empty(0) for name in own}})


# ---- a whole CLIP -----------------------------------------------------------------------------


def test_constants_beside_the_weights() -> None:
    clip, extra = whole(), torch.tensor(-10.0)
    given = {**clip_state(), "logit_bias": extra, "text.embeddings.position_ids": extra}
    load_pretrained(clip, opened(given))
    assert all(torch.equal(clip.model.state_dict()[n], t) for n, t in clip_state().items())


def test_without_a_temperature() -> None:
    clip, given = whole(), clip_state()
    del given["logit_scale"]
    with pytest.raises(AdamergeError, match=r"lacks logit_scale, the temperature.*head:"):
        load_pretrained(clip, opened(given))
    load_pretrained(clip, opened(given), logit_scale=50)
    assert float(clip.model.logit_scale.exp()) == pytest.approx(50)


def test_text_names_of_either_kind(tmp_path: Path) -> None:
    plain = clip_state()
    custom = {n if n.startswith(("visual.", "logit")) else f"text.{n}": t for n, t in plain.items()}
    clip = whole()
    load_pretrained(clip, opened(custom))
    assert all(torch.equal(clip.model.state_dict()[n], t) for n, t in plain.items())
    text = (golden.FOLDER / "model.json").read_text()
    config = tmp_path / "model.json"
    config.write_text(text.replace("{", '{"custom_text": true, ', 1))
    other = build_clip(str(config))
    load_pretrained(other, opened(plain))
    assert all(torch.equal(other.model.state_dict()[n], t) for n, t in custom.items())


def test_a_pretrained_tower_alone_where_heads_are_given() -> None:
    """As the papers' zeroshot.pt: an image tower with the rest of a text tower."""
    given = {f"model.{n}": t for n, t in clip_state().items() if not n.startswith("transformer.")}
    with pytest.raises(AdamergeError, match=r"expected a whole CLIP.*a stored head \(head:\)"):
        load_pretrained(whole(), opened(given))
    clip = whole()
    load_pretrained(clip, opened(given), text=False)
    own = clip.backbone.state_dict()
    assert all(torch.equal(own[name], t) for name, t in backbone().state_dict().items())
    assert bool(clip.model.encode_text(torch.ones(1, 8, dtype=torch.long)).isnan().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing": "zeros"}, r"suite\.missing is 'zeros': expected pretrained"),
        ({"logit_scale": "much"}, r"suite\.logit_scale is 'much'"),
        ({"logit_scale": -1}, r"suite\.logit_scale is -1"),
        ({"tasks": {"a": {"missing": True}}}, r"suite\.tasks\.a\.missing is True"),
        ({"unseen": {"a": {"missing": "pretrained"}}}, r"suite\.unseen\.a\.missing is unknown"),
    ],
)
def test_settings_of_a_suite(change: dict[str, object], message: str) -> None:
    suite = {"architecture": "x", "pretrained": "y", "tasks": {"b": {}}, **change}
    assert [problem for problem in suite_problems(suite) if re.search(message, problem)]


# ---- SigLIP -----------------------------------------------------------------------------------


class SigLip(nn.Module):
    """As open_clip builds one: a timm tower pooled by attention, and its own text tower."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.trunk = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2,
            class_token=False, global_pool="map", num_classes=0, act_layer="gelu_tanh",
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        )  # fmt: skip
        self.text = open_clip.transformer.TextTransformer(
            context_length=16, vocab_size=100, width=64, heads=2, layers=1, mlp_ratio=2,
            output_dim=64, no_causal_mask=True, proj_bias=True, pool_type="last",
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            act_layer=functools.partial(nn.GELU, approximate="tanh"),
        )  # fmt: skip
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))


@torch.no_grad()
def test_siglip_of_transformers_exactly() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    vision = {**sizes, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16}
    text = {**sizes, "num_hidden_layers": 1, "vocab_size": 100, "max_position_embeddings": 16}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.SiglipConfig(vision_config=vision, text_config=text)
    theirs, ours = transformers.SiglipModel(config).eval(), SigLip().eval()
    for parameter in theirs.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    state = theirs.state_dict()
    clip = Clip(ours, {}, lambda words: torch.zeros(1))
    load_pretrained(clip, opened({f"module.{name}": t for name, t in state.items()}))
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(0, 100, (3, 16))
    wanted = theirs.vision_model(pixel_values=images).pooler_output
    torch.testing.assert_close(ours.visual.trunk(images), wanted, atol=1e-5, rtol=1e-5)
    wanted = theirs.text_model(input_ids=tokens).pooler_output
    torch.testing.assert_close(ours.text(tokens), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.logit_bias, state["logit_bias"])
    back = Layout(ours.state_dict()).names
    assert set(back) == set(state) and all(torch.equal(back[n], t) for n, t in state.items())
    tower = tower_state(opened(state), SigLip().visual)
    assert all(torch.equal(tower[n], t) for n, t in ours.visual.state_dict().items())


def test_configs_of_siglip() -> None:
    config = {"model_type": "siglip", "vision_config": {}, "text_config": {}}
    found = from_transformers(config, {}, "config.json")
    assert found["model_cfg"] == open_clip.get_model_config("ViT-B-16-SigLIP")
    assert found["preprocess_cfg"]["resize_mode"] == "squash"
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 384}
    texts = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    config |= {"vision_config": large, "text_config": texts}
    found = from_transformers(config, {}, "config.json")
    assert found["model_cfg"] == open_clip.get_model_config("ViT-L-16-SigLIP-384")
    config["vision_config"] = {"hidden_size": 64}
    with pytest.raises(AdamergeError, match=r"type 'siglip' with an image tower of width 64"):
        from_transformers(config, {}, "config.json")
    for hostile in ([1], {"hidden_size": [64]}, {"patch_size": "16"}):
        config["vision_config"] = hostile
        with pytest.raises(AdamergeError, match=r"config\.json has vision_config\..*: expected a"):
            from_transformers(config, {}, "config.json")
