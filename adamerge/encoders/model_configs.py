"""One architecture, two descriptions: open_clip's model config and transformers' `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import open_clip

from adamerge._base.errors import AdamergeError
from adamerge.weights.formats.read import VISION

# open_clip's name of a size -> transformers'
_VISION_SIZES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
}
_TEXT_SIZES = {
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
}
_KNOWN = {
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {*_VISION_SIZES, "head_width", "mlp_ratio"},
    "text_cfg": {*_TEXT_SIZES, "mlp_ratio"},
}
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
            **{name: vision[theirs] for name, theirs in _VISION_SIZES.items()},
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": _ratio(vision),
        },
        "text_cfg": {
            **{name: text[theirs] for name, theirs in _TEXT_SIZES.items()},
            "mlp_ratio": _ratio(text),
        },
    }
    return {"model_cfg": model, "preprocess_cfg": _preprocess(processor, _MEAN, _STD)}


def _preprocess(
    processor: Mapping[str, Any], mean: list[float], std: list[float]
) -> dict[str, Any]:
    return {
        "mean": processor.get("image_mean", mean),
        "std": processor.get("image_std", std),
        "interpolation": _RESAMPLING.get(processor.get("resample", 3), "bicubic"),
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
    vision = _part(config, "vision_config", _SIGLIP_VISION, where)
    text = _part(config, "text_config", _SIGLIP_TEXT, where)
    size = _SIGLIP_SIZES.get(vision["hidden_size"], "?")
    tower = f"vit_{size}_patch{vision['patch_size']}_siglip_{vision['image_size']}"
    wanted = {name: text[theirs] for name, theirs in _TEXT_SIZES.items()}
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
    preprocess = _preprocess(processor, [0.5] * 3, [0.5] * 3)
    return {"model_cfg": model, "preprocess_cfg": {**preprocess, "resize_mode": "squash"}}


def _ratio(part: Mapping[str, Any]) -> float:
    """What open_clip multiplies the width with, and rounds down, to get the hidden size."""
    width, hidden = int(part["hidden_size"]), int(part["intermediate_size"])
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


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
    vision = {"head_width": 64, "mlp_ratio": 4.0, **vision}
    text = {"context_length": 77, "vocab_size": 49408, "mlp_ratio": 4.0, **text}
    both = {
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "projection_dim": model["embed_dim"],
    }
    written = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "vision_config": {
            **both,
            **{theirs: vision[name] for name, theirs in _VISION_SIZES.items()},
            "model_type": "clip_vision_model",
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_attention_heads": vision["width"] // vision["head_width"],
        },
        "text_config": {
            **both,
            **{theirs: text[name] for name, theirs in _TEXT_SIZES.items()},
            "model_type": "clip_text_model",
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "intermediate_size": int(text["width"] * text["mlp_ratio"]),
        },
    }
    preprocess, size = config.get("preprocess_cfg", {}), vision["image_size"]
    bilinear = preprocess.get("interpolation") == "bilinear"
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        **dict.fromkeys(("do_center_crop", "do_normalize", "do_resize"), True),
        "crop_size": {"height": size, "width": size},
        "size": {"shortest_edge": size},
        "image_mean": list(preprocess.get("mean", _MEAN)),
        "image_std": list(preprocess.get("std", _STD)),
        "resample": 2 if bilinear else 3,
    }
    return written, processor
