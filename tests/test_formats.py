"""Every format written by its own library gives the same tower: features equal to 1e-5."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import open_clip
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import transforms

from adamerge import AdamergeError
from adamerge.cli import main
from adamerge.cli.convert import convert
from adamerge.encoders.clip import Clip, build_clip
from adamerge.encoders.pretrained import load_pretrained
from adamerge.weights.formats.layouts import clip_to_transformers
from adamerge.weights.formats.lora import LoraConfig, lora_expert
from adamerge.weights.formats.read import read, read_head, tower_state
from tests.tiny import make_suite

IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
VISION = {
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8, "projection_dim": 16, "hidden_act": "gelu",
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 49408, "max_position_embeddings": 16, "projection_dim": 16,
    "hidden_act": "gelu", "bos_token_id": 49406, "eos_token_id": 49407,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _their_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|peft|huggingface_hub)\b")
        warnings.filterwarnings("ignore", message=".*(deprecated|peft).*")
        yield


@pytest.fixture
def clip(tmp_path: Path) -> Clip:
    make_suite(tmp_path / "suite")
    clip = build_clip(str(tmp_path / "suite" / "model"))
    load_pretrained(clip, read(tmp_path / "suite" / "model"))
    return clip


def theirs(seed: int = 0) -> transformers.CLIPModel:
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # its initial values are so small that any error would be small too
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def pooled(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    """Image features of transformers' model, whatever it wraps them in."""
    with torch.no_grad():
        found = model.get_image_features(pixel_values=images)
    return found if isinstance(found, Tensor) else found.pooler_output


def features(clip: Clip, state: dict[str, Tensor] | None = None) -> Tensor:
    if state is not None:
        clip.backbone.load_state_dict(state)
    with torch.no_grad():
        return clip.backbone(IMAGES)


@pytest.mark.parametrize("shards", [False, True])
def test_a_whole_transformers_clip(tmp_path: Path, shards: bool) -> None:
    model = theirs()
    folder = tmp_path / "hf"
    model.save_pretrained(folder, max_shard_size="300KB" if shards else "5GB")
    assert (folder / "model.safetensors.index.json").is_file() == shards
    clip = build_clip(str(folder))
    load_pretrained(clip, read(folder))
    torch.testing.assert_close(features(clip), pooled(model), atol=1e-5, rtol=1e-5)
    tokens = clip.tokenizer(["a photo of a cat", "two dogs on a very long lawn"], 16)
    with torch.no_grad():
        found = model.get_text_features(input_ids=tokens)
        found = found if isinstance(found, Tensor) else found.pooler_output
        torch.testing.assert_close(clip.model.encode_text(tokens), found, atol=1e-5, rtol=1e-5)
    scale = model.logit_scale.detach()
    assert torch.equal(clip.model.logit_scale.detach().view(()), scale.view(()))


def as_clip(model: transformers.CLIPModel, folder: Path) -> None:
    model.save_pretrained(folder)


def as_tower(model: transformers.CLIPModel, folder: Path) -> None:
    as_clip(model, folder / "whole")
    kind = transformers.CLIPVisionModel
    kind.from_pretrained(folder / "whole").save_pretrained(folder)


def as_projected(model: transformers.CLIPModel, folder: Path) -> None:
    as_clip(model, folder / "whole")
    kind = transformers.CLIPVisionModelWithProjection
    kind.from_pretrained(folder / "whole").save_pretrained(folder)


def as_old_bin(model: transformers.CLIPModel, folder: Path) -> None:
    """As transformers 4 wrote it: a pickle of tensors, with the constants of that time."""
    state = {**model.state_dict(), "vision_model.embeddings.position_ids": torch.arange(5)[None],
             "text_model.embeddings.position_ids": torch.arange(16)[None]}  # fmt: skip
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)


def as_old_tower(model: transformers.CLIPModel, folder: Path) -> None:
    """As transformers 4 wrote a CLIPVisionModel: names under vision_model."""
    folder.mkdir(parents=True)
    kept = {k: v.contiguous() for k, v in model.state_dict().items() if k.startswith("vision_m")}
    save_file(kept, folder / "model.safetensors")


@pytest.mark.parametrize("write", [as_clip, as_tower, as_projected, as_old_bin, as_old_tower])
def test_a_transformers_expert(
    clip: Clip, tmp_path: Path, write: Callable[[transformers.CLIPModel, Path], None]
) -> None:
    model = theirs()
    write(model, tmp_path / "expert")
    state = tower_state(read(tmp_path / "expert"), clip.backbone)
    assert list(state) == list(clip.backbone.state_dict())
    if write in (as_tower, as_old_tower):  # they have no projection: the pretrained one is used
        assert torch.equal(state["proj"], clip.backbone.state_dict()["proj"])
        with torch.no_grad():
            model.visual_projection.weight.copy_(clip.backbone.state_dict()["proj"].T)
    torch.testing.assert_close(features(clip, state), pooled(model), atol=1e-5, rtol=1e-5)


def test_to_transformers_and_back(clip: Clip, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    convert(str(tmp_path / "suite" / "model"), tmp_path / "hf", "transformers")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    assert set(model.state_dict()) == set(clip_to_transformers(before))
    torch.testing.assert_close(features(clip), pooled(model), atol=1e-5, rtol=1e-5)
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        found = tower(pixel_values=IMAGES).image_embeds
    torch.testing.assert_close(features(clip), found, atol=1e-5, rtol=1e-5)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(processor.image_mean) == list(clip.preprocess_cfg.mean)
    convert(str(tmp_path / "hf"), tmp_path / "back", "open_clip")
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'back'}")
    assert all(torch.equal(loaded.state_dict()[name], before[name]) for name in before)
    assert build_clip(str(tmp_path / "back")).preprocess_cfg == clip.preprocess_cfg


def test_convert_a_tower_with_its_pretrained(clip: Clip, tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    arguments = [str(suite / "dots.safetensors"), str(tmp_path / "out"), "--pretrained"]
    assert main(["convert", *arguments, str(suite / "model")]) == 0
    found, whole = load_file(tmp_path / "out" / "open_clip_model.safetensors"), clip.model
    expert = load_file(suite / "dots.safetensors")
    for name, tensor in whole.state_dict().items():
        wanted = expert[name.removeprefix("visual.")] if name.startswith("visual.") else tensor
        assert torch.equal(found[name], wanted)


def test_convert_refuses(clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite, out = tmp_path / "suite", str(tmp_path / "out")
    tower, whole = str(suite / "dots.safetensors"), str(suite / "model")
    for arguments, message in (
        ([tower, out], "the architecture is not named"),
        ([tower, out, "--architecture", whole], "expected a whole CLIP"),
        ([str(suite / "none.pt"), out], "does not exist"),
        ([tower, whole], "already holds files"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    other = {**clip.backbone.state_dict(), "conv1.weight": torch.ones(2)}
    torch.save(other, tmp_path / "odd.pt")
    with pytest.raises(AdamergeError, match=r"odd\.pt does not fit .* at tensor"):
        convert(str(tmp_path / "odd.pt"), tmp_path / "out", pretrained=whole)
    damaged = {**clip.backbone.state_dict(), "proj": clip.backbone.proj.detach() * torch.nan}
    torch.save(damaged, tmp_path / "nan.pt")
    with pytest.raises(AdamergeError, match=r"nan\.pt: tensor 'visual\.proj' has NaN"):
        convert(str(tmp_path / "nan.pt"), tmp_path / "out", pretrained=whole)
    config = json.loads((suite / "model" / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["ls_init_value"] = 0.1
    (suite / "model" / "open_clip_config.json").write_text(json.dumps(config))
    layered = build_clip(whole).model.state_dict()
    plain = {name: tensor.contiguous() for name, tensor in layered.items()}
    save_file(plain, suite / "model" / "open_clip_model.safetensors")
    with pytest.raises(AdamergeError, match=r"ls_init_value = 0\.1 has no place in transformers"):
        convert(whole, tmp_path / "out", "transformers")


# ---- the papers' pickles ----------------------------------------------------------------------


def vanishing(clip: Clip) -> tuple[nn.Module, nn.Module]:
    """An ImageEncoder and a ClassificationHead of modules that will not be there to read them."""
    module = types.ModuleType("src_of_a_paper.modeling")
    sys.modules["src_of_a_paper"] = types.ModuleType("src_of_a_paper")
    sys.modules["src_of_a_paper.modeling"] = module

    class ImageEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = clip.model
            interpolation = transforms.InterpolationMode.BICUBIC
            steps = [transforms.Resize(16, interpolation), convert_rgb, transforms.ToTensor()]
            self.train_preprocess = self.val_preprocess = transforms.Compose(steps)
            self.args = types.SimpleNamespace(model="ViT-B-32")
            self.cache_dir = None

    def convert_rgb(image: object) -> object:
        return image

    class ClassificationHead(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 4)
            self.normalize = True
            nn.init.zeros_(self.bias)

    for found in (ImageEncoder, ClassificationHead, convert_rgb):
        found.__module__, found.__qualname__ = module.__name__, found.__name__
        setattr(module, found.__name__, found)
    Namespace = type("Namespace", (), {"__module__": module.__name__})
    module.Namespace = Namespace  # type: ignore[attr-defined]
    encoder = ImageEncoder()
    encoder.args = Namespace()
    encoder.args.model = "ViT-B-32"
    return encoder, ClassificationHead()


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_modules_whose_classes_are_gone(clip: Clip, tmp_path: Path, legacy: bool) -> None:
    encoder, head = vanishing(clip)
    with warnings.catch_warnings():  # legacy files look for the source of each class
        warnings.simplefilter("ignore")
        for name, module in (("finetuned.pt", encoder), ("head_Dots.pt", head)):
            torch.save(module, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    for name in ("src_of_a_paper", "src_of_a_paper.modeling"):
        del sys.modules[name]
    wanted = features(clip)
    state = tower_state(read(tmp_path / "finetuned.pt"), clip.backbone)
    assert list(state) == list(clip.backbone.state_dict())
    assert all(torch.equal(state[n], t) for n, t in clip.backbone.state_dict().items())
    assert torch.equal(features(clip, state), wanted)
    whole = build_clip(str(tmp_path / "suite" / "model"))
    load_pretrained(whole, read(tmp_path / "finetuned.pt"))
    assert torch.equal(features(whole), wanted)
    assert torch.equal(read_head(tmp_path / "head_Dots.pt"), head.weight.detach())
    assert "src_of_a_paper" not in sys.modules


def test_heads_that_are_none(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "two.pt")
    with pytest.raises(AdamergeError, match=r"head .*two\.pt holds 2 matrices"):
        read_head(tmp_path / "two.pt")
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "bias.pt")
    with pytest.raises(AdamergeError, match="non-zero 'bias' beside its weight"):
        read_head(tmp_path / "bias.pt")


# ---- LoRA -------------------------------------------------------------------------------------


def trained(model: nn.Module, folder: Path, **settings: object) -> nn.Module:
    """A PEFT adapter with nothing left at its initial value, saved; returns the adapted model."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted.eval()


ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["k_proj", "fc1"]},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "fc1", "fc2"],
        "rank_pattern": {"fc1": 2, "layers.1.mlp.fc2": 3}, "alpha_pattern": {"fc1": 5},
    },
    "whole names": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"vision_model.encoder.layers.0.self_attn.q_proj": 64, "v_proj": 2},
    },
    "everything": {
        "r": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2",
                                   "patch_embedding", "position_embedding"],
        "bias": "all", "modules_to_save": ["post_layernorm"],
    },
    "lora bias": {"r": 2, "target_modules": ["fc1"], "lora_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("tower", [True, False])
def test_lora_on_transformers_names(clip: Clip, tmp_path: Path, name: str, tower: bool) -> None:
    convert(str(tmp_path / "suite" / "model"), tmp_path / "hf", "transformers")
    kind = transformers.CLIPVisionModelWithProjection if tower else transformers.CLIPModel
    settings = dict(ADAPTERS[name])
    if not tower and name == "everything":  # of a text tower there is nothing to embed patches of
        settings["target_modules"] = ["q_proj", "fc1", "visual_projection"]
    model = trained(kind.from_pretrained(tmp_path / "hf"), tmp_path / "lora", **settings)
    state = tower_state(read(tmp_path / "lora"), clip.backbone)
    with torch.no_grad():
        wanted = model(pixel_values=IMAGES).image_embeds if tower else pooled(model)
    before = features(clip)
    torch.testing.assert_close(features(clip, state), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - before).abs().max() > 0.05


def test_lora_on_open_clip_names(clip: Clip, tmp_path: Path) -> None:
    tower = build_clip(str(tmp_path / "suite" / "model"))
    load_pretrained(tower, read(tmp_path / "suite" / "model"))
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["attn", "c_fc", "c_proj", "conv1"]}
    merged = trained(tower.backbone, tmp_path / "lora", **settings)
    state = tower_state(read(tmp_path / "lora"), clip.backbone)
    with torch.no_grad():
        wanted = merged(IMAGES)
    assert (wanted - features(clip)).abs().max() > 0.05
    torch.testing.assert_close(features(clip, state), wanted, atol=1e-5, rtol=1e-5)


def test_the_head_of_an_adapter_is_left_out(
    clip: Clip, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "adamerge")
    convert(str(tmp_path / "suite" / "model"), tmp_path / "hf", "transformers")
    kind = transformers.CLIPForImageClassification
    model = kind.from_pretrained(tmp_path / "hf", num_labels=3)
    settings = {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]}
    adapted = trained(model, tmp_path / "lora", **settings)
    state = tower_state(read(tmp_path / "lora"), clip.backbone)
    assert "classifier.weight" in caplog.text and "left out: a head of its task" in caplog.text
    with torch.no_grad():
        tower = adapted.base_model.model.vision_model(pixel_values=IMAGES)
        wanted = tower.pooler_output @ clip.backbone.proj
    assert (wanted - features(clip)).abs().max() > 0.05
    torch.testing.assert_close(features(clip, state), wanted, atol=1e-5, rtol=1e-5)


def test_lora_patterns_on_open_clip_names(clip: Clip, tmp_path: Path) -> None:
    """The output projection has the settings of its attention."""
    tower = build_clip(str(tmp_path / "suite" / "model"))
    load_pretrained(tower, read(tmp_path / "suite" / "model"))
    patterns = {"transformer.resblocks.0.attn": 20, "1.mlp.c_fc": 1}
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["attn", "c_fc"]}
    merged = trained(tower.backbone, tmp_path / "lora", **settings, alpha_pattern=patterns)
    state = tower_state(read(tmp_path / "lora"), clip.backbone)
    with torch.no_grad():
        wanted = merged(IMAGES)
    torch.testing.assert_close(features(clip, state), wanted, atol=1e-5, rtol=1e-5)


def test_lora_transposed(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "lora_alpha": 4, "fan_in_fan_out": True})
    )
    a, b, base = torch.randn(2, 5), torch.randn(3, 2), torch.randn(5, 3)
    adapter = {"base_model.model.x.lora_A.weight": a, "base_model.model.x.lora_B.weight": b}
    config = LoraConfig(tmp_path / "adapter_config.json")
    found = lora_expert(adapter, config, {"x.weight": base})
    torch.testing.assert_close(found["x.weight"], base + 2 * (b @ a).T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "has use_dora set: only plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights set"),
        ({"peft_type": "IA3"}, "has peft_type IA3"),
        ({"alpha_pattern": {"(a+)+": 2}}, r"pattern '\(a\+\)\+' in alpha_pattern"),
        ({"lora_alpha": "much"}, "is not an adapter config"),
    ],
)
def test_adapters_that_cannot_be_merged_exactly(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, **change}))
    with pytest.raises(AdamergeError, match=message):
        LoraConfig(path)


def test_adapters_that_do_not_fit(clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    name = "base_model.model.transformer.resblocks.0.mlp.c_fc.lora_"
    for tensors, message in (
        ({f"{name}A.weight": torch.ones(2, 32)}, "not the B that belongs to it"),
        ({f"{name}A.weight": torch.ones(2, 32), f"{name}B.weight": torch.ones(9, 2)}, "be merged"),
        ({"base_model.model.nowhere.weight": torch.ones(1)}, "adapts 'nowhere.weight', which this"),
        ({"base_model.model.text_model.x.lora_A.weight": torch.ones(1, 2)}, "changes no tensor"),
        ({"base_model.model.ln_pre.weight": torch.ones(9)}, r"shape \[9\], the tower has \[32\]"),
    ):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdamergeError, match=message):
            dict(tower_state(read(tmp_path), clip.backbone))
    with pytest.raises(AdamergeError, match="is a LoRA adapter: expected the whole CLIP"):
        load_pretrained(clip, read(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip_vision_model"}, "describes an image tower alone"),
        ({"model_type": "bert"}, "a model of type 'bert'"),
        ({"vision_config": {**VISION, "hidden_act": "relu"}}, "hidden_act 'relu' and 'gelu'"),
        ({"vision_config": {**VISION, "layer_norm_eps": 1e-2}}, r"layer_norm_eps 0\.01: open_clip"),
        (
            {"text_config": {**TEXT, "eos_token_id": 5}},
            r"eos_token_id 5: .*highest token id, 49407",
        ),
    ],
)
def test_transformers_configs_that_are_no_clip(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = {"model_type": "clip", "vision_config": VISION, "text_config": TEXT, **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdamergeError, match=message):
        build_clip(str(tmp_path))


@pytest.mark.parametrize(("width", "hidden"), [(176, 240), (48, 100), (32, 128)])
def test_any_hidden_size(tmp_path: Path, width: int, hidden: int) -> None:
    vision = {**VISION, "hidden_size": width, "intermediate_size": hidden}
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    clip = build_clip(str(tmp_path / "hf"))
    load_pretrained(clip, read(tmp_path / "hf"))
    torch.testing.assert_close(features(clip), pooled(model), atol=1e-5, rtol=1e-5)
    convert(str(tmp_path / "hf"), tmp_path / "again", "transformers")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["vision_config"]["intermediate_size"] == hidden


def test_shards_elsewhere_or_twice(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ("[]", "is not an index of weight files"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "names files outside its own folder"),
        ('{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}', "repeats tensor 'x'"),
    ):
        index.write_text(text)
        for name in ("a", "b"):
            save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(AdamergeError, match=message):
            read(tmp_path)
