"""Architectures by open_clip's names, and the shapes of their towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import open_clip


class Tower(NamedTuple):
    """The shape of a vision transformer; `positions` counts patches and the class token."""

    width: int
    layers: int
    patch: int
    positions: int


def names_of(shape: Tower, features: int | None) -> list[str]:
    """open_clip's names of plain CLIPs with such an image tower, GELU before QuickGELU."""
    configs = {name: open_clip.get_model_config(name) or {} for name in open_clip.list_models()}
    found = [name for name, config in configs.items() if shape_of(config) == shape]
    return sorted((n for n in found if features in (None, configs[n]["embed_dim"])), key=len)


def architecture_names(config: Mapping[str, Any]) -> list[str]:
    """open_clip's names of a model, given as `Clip.config`; none where it has no plain CLIP's."""
    shape = shape_of(config["model_cfg"])
    return [] if shape is None else names_of(shape, config["model_cfg"]["embed_dim"])


def shape_of(config: dict[str, object]) -> Tower | None:
    """The image tower of an open_clip model config; None if it is no plain CLIP's."""
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        return None
    sizes = [vision.get(key) for key in ("width", "layers", "patch_size", "image_size")]
    named = {"multimodal_cfg", "custom_text", "hf_model_name", "timm_model_name"}
    if named & {*config, *vision, *text} or not all(isinstance(n, int) for n in sizes):
        return None
    width, layers, patch, image = (int(str(n)) for n in sizes)
    return Tower(width, layers, patch, (image // patch) ** 2 + 1)


def is_known(name: object) -> bool:
    """Whether open_clip has a model of that name; of some others it would ask the hub."""
    return name in open_clip.list_models()


def shape_named(name: str | None) -> Tower | None:
    """The image tower of open_clip's model of that name; None if it has none, or no plain CLIP."""
    return shape_of(open_clip.get_model_config(name)) if is_known(name) else None


def has_tag(name: str, tag: str) -> bool:
    """Whether open_clip has weights of a model under a tag."""
    return tag in open_clip.list_pretrained_tags_by_model(name)


def activation_fits(name: str, tag: str | None) -> bool:
    """Whether a model is built with the activation that a tag's weights were trained with."""
    weights = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    model = open_clip.get_model_config(name) or {}
    return bool(weights) and bool(weights.get("quick_gelu")) == bool(model.get("quick_gelu"))
