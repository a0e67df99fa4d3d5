"""One architecture, two descriptions: open_clip's model config and transformers' `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import open_clip

from adamerge._base.errors import AdamergeError
from adamerge.weights.formats.read import VISION

_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# The same of SigLIP's, and what timm calls its image towers by their widths.
_SIGLIP_VISION = {"hidden_size": 768, "num_hidden_layers": 12, "image_size": 224, "patch_size": 16}
_SIGLIP_TEXT = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 32000,
    "max_position_embeddings": 64,
}
_SIGLIP_SIZES = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}
_EPS = 1e-5  # of open_clip's layer norms
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # OpenAI's
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as image processors store them


def from_transformers(
    config: Mapping[str, Any], processor: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """An `open_clip_config.json` of the CLIP that a `config.json` describes.

    Args:
        config: of a whole CLIP (`model_type: clip`), or SigLIP (`siglip`).
        processor: its `preprocessor_config.json`, or empty: then as OpenAI's.
        where: the file, for messages.

    Raises:
        AdamergeError: an image tower alone, another model, or one open_clip cannot express.
    """
    kind = config.get("model_type")
    if kind == "siglip":
        return _siglip(config, processor, where)
    if kind != "clip":
        alone = kind == "clip_vision_model"
        raise AdamergeError(
            f"{where} describes {'an image tower alone' if alone else f'a model of type {kind!r}'}:"
            " expected a whole CLIP (model_type clip), because the heads come from its text tower"
        )
    # The very old files have the same under `…_config_dict`, the newest leave defaults out.
    vision = _part(config, "vision_config", VISION, where)
    text = _part(config, "text_config", _TEXT, where)
    activation = vision["hidden_act"]
    if activation not in _ACTIVATIONS or activation != text["hidden_act"]:
        raise AdamergeError(
            f"{where} has hidden_act {vision['hidden_act']!r} and {text['hidden_act']!r}: expected "
            "quick_gelu or gelu in both towers; open_clip cannot express others"
        )
    for part in (vision, text):
        if part["layer_norm_eps"] != _EPS:
            raise AdamergeError(
                f"{where} has layer_norm_eps {part['layer_norm_eps']!r}: open_clip computes with "
                f"{_EPS}, so features would differ; there is no exact conversion"
            )
    end, highest = text.get("eos_token_id", 49407), text["vocab_size"] - 1
    if end not in (2, highest):  # 2, of old files, stands for the highest id too
        raise AdamergeError(
            f"{where} has text_config.eos_token_id {end!r}: open_clip takes the text's features at "
            f"the highest token id, {highest}, so heads would differ; there is no exact conversion"
        )
    model = {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _ACTIVATIONS[activation],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": _ratio(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": _ratio(text),
        },
    }
    return {
        "model_cfg": model,
        "preprocess_cfg": {
            "mean": processor.get("image_mean", _MEAN),
            "std": processor.get("image_std", _STD),
            "interpolation": "bilinear" if processor.get("resample") == 2 else "bicubic",
        },
    }


def _part(
    config: Mapping[str, Any], key: str, usual: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The settings of one tower, with transformers' defaults for those left out."""
    given = config.get(key) or {}
    whole = {**usual, **given} if isinstance(given, Mapping) else {key: given}
    for name, value in usual.items():
        wrong = type(whole.get(name)) is not type(value)
        if wrong or (isinstance(value, int) and whole[name] < 1):
            raise AdamergeError(
                f"{where} has {key}.{name} {whole.get(name)!r}: expected a value like {value!r}; "
                "download or save it again"
            )
    return whole


def _siglip(config: Mapping[str, Any], processor: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The published architecture of open_clip's with the sizes of a SigLIP's `config.json`."""
    vision = {**_SIGLIP_VISION, **(config.get("vision_config") or {})}
    text = {**_SIGLIP_TEXT, **(config.get("text_config") or {})}
    size = _SIGLIP_SIZES.get(vision["hidden_size"], "?")
    tower = f"vit_{size}_patch{vision['patch_size']}_siglip_{vision['image_size']}"
    wanted = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
    }
    for name in open_clip.list_models():
        model = open_clip.get_model_config(name) or {}
        parts = (model.get("vision_cfg", {}), model.get("text_cfg", {}))
        if parts[0].get("timm_model_name") == tower and wanted.items() <= parts[1].items():
            break
    else:
        raise AdamergeError(
            f"{where} describes a model of type 'siglip' with an image tower of width "
            f"{vision['hidden_size']}, {vision['image_size']} pixels and {wanted['vocab_size']} "
            "tokens, which none of open_clip's SigLIPs has: name one as suite.architecture"
        )
    preprocess = {
        "mean": processor.get("image_mean", [0.5] * 3),
        "std": processor.get("image_std", [0.5] * 3),
        "interpolation": _RESAMPLING.get(processor.get("resample", 3), "bicubic"),
        "resize_mode": "squash",
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _ratio(part: Mapping[str, Any]) -> float:
    """What open_clip multiplies the width with, and rounds down, to get the hidden size."""
    width, hidden = int(part["hidden_size"]), int(part["intermediate_size"])
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


_KNOWN = {
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"image_size", "patch_size", "layers", "width", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}


def to_transformers(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` and `preprocessor_config.json` of a CLIP from its `open_clip_config.json`.

    Raises:
        AdamergeError: a setting that transformers' CLIP does not have.
    """
    model = config["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    for name, part in (("model_cfg", model), ("vision_cfg", vision), ("text_cfg", text)):
        for key, value in part.items():
            if key not in _KNOWN[name] and value not in (None, False):
                raise AdamergeError(
                    f"{name}.{key} = {value!r} has no place in transformers' CLIP: write this "
                    "model as an open_clip folder"
                )
    if not all(isinstance(vision.get(key), int) for key in ("layers", "patch_size", "image_size")):
        raise AdamergeError(
            "transformers' CLIP has plain vision transformers on square images: write this model "
            "as an open_clip folder"
        )
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    dim = model["embed_dim"]
    written = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": dim,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": act,
            "hidden_size": vision["width"],
            "image_size": vision["image_size"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "num_hidden_layers": vision["layers"],
            "patch_size": vision["patch_size"],
            "projection_dim": dim,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "hidden_act": act,
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "max_position_embeddings": text.get("context_length", 77),
            "num_attention_heads": text["heads"],
            "num_hidden_layers": text["layers"],
            "projection_dim": dim,
            "vocab_size": text.get("vocab_size", 49408),
        },
    }
    preprocess = config.get("preprocess_cfg", {})
    size = vision["image_size"]
    resample = {name: number for number, name in _RESAMPLING.items()}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "crop_size": {"height": size, "width": size},
        "size": {"shortest_edge": size},
        "image_mean": list(preprocess.get("mean", _MEAN)),
        "image_std": list(preprocess.get("std", _STD)),
        "resample": resample.get(preprocess.get("interpolation", "bicubic"), 3),
    }
    return written, processor
