"""A whole CLIP filled from a checkpoint: image tower, text tower, scale."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import cast

import open_clip
import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.clip import Clip, other_activation
from adamerge.weights.formats.fitting import check_whole, lacks_text, other_shape, with_text_names
from adamerge.weights.formats.matching import match
from adamerge.weights.formats.read import Checkpoint, tower_state

log = logging.getLogger("adamerge")


def load_pretrained(
    clip: Clip, checkpoint: Checkpoint, text: bool = True, logit_scale: float | None = None
) -> None:
    """Fills a CLIP, image and text tower, from a checkpoint.

    A table of positions of another resolution is interpolated as open_clip does.

    Args:
        text: whether the text tower is needed. If not, and the checkpoint lacks it, it becomes
            NaN, so that nothing can be made with it by mistake.
        logit_scale: what similarities are multiplied with, where the checkpoint does not tell.

    Raises:
        AdamergeError: names or shapes that do not fit the architecture; an image tower alone,
            where the heads come from the text tower.
    """
    where, state = f"pretrained ({checkpoint.path})", clip.model.state_dict()
    if checkpoint.lora is not None:
        raise AdamergeError(f"{where} is a LoRA adapter: expected the whole CLIP it was trained on")
    matched = with_text_names(match(checkpoint.source, checkpoint.tensors, state)).without_heads()
    if not text and lacks_text(matched):
        log.info("%s has no text tower, which the given heads do not need", where)
        tower = tower_state(checkpoint, clip.backbone)
        _fill(clip, {f"visual.{name}": tower[name] for name in tower}, where)
        return
    missing = [name for name in matched.missing if name != "logit_bias"]
    extra = [name for name in matched.extra if name != "logit_bias"]  # to softmax a constant
    if logit_scale is not None and "logit_scale" in missing:
        missing.remove("logit_scale")
    check_whole(matched, missing, extra, where)
    with torch.no_grad():
        if "logit_bias" in matched.missing:
            cast(Tensor, clip.model.logit_bias).zero_()
        if logit_scale is not None and "logit_scale" in matched.missing:
            cast(Tensor, clip.model.logit_scale).fill_(math.log(logit_scale))
    _fill(clip, matched.state(), where)


def _fill(clip: Clip, state: Mapping[str, Tensor], where: str) -> None:
    """Copies tensors into a CLIP; those of a text tower that are not there become NaN."""
    with torch.no_grad():
        for name, tensor in clip.model.state_dict().items():
            if name not in state:
                _ = tensor.fill_(float("nan")) if tensor.is_floating_point() else None
                continue
            loaded = state[name]
            if loaded.shape != tensor.shape:
                loaded = _interpolated(clip.model, name, loaded)
            scalar = loaded.numel() == tensor.numel() == 1  # logit_scale is [] or [1]
            if loaded.shape != tensor.shape and not scalar:
                mend = "set suite.architecture to the one it was trained with"
                raise AdamergeError(
                    f"{where} has tensor {name!r} of shape {list(loaded.shape)}, the architecture "
                    f"has {list(tensor.shape)}: "
                    f"{other_shape(name, loaded.shape, tensor.shape, mend)}"
                )
            tensor.copy_(loaded.reshape(tensor.shape))


def _interpolated(model: nn.Module, name: str, table: Tensor) -> Tensor:
    """A table of positions at the model's resolution, or length of text, as open_clip makes it."""
    state = {name: table}
    try:
        open_clip.model.resize_pos_embed(state, model)
        open_clip.model.resize_text_pos_embed(state, model)
    except (RuntimeError, AssertionError, IndexError):  # another width, or no grid
        return table
    if state[name] is not table:
        sizes = (len(table), len(state[name]))
        log.warning("pretrained: %s is interpolated from %d to %d positions", name, *sizes)
    return state[name]


def check_stated(clip: Clip, checkpoint: Checkpoint, architecture: str) -> None:
    """Refuses weights whose own config states what the architecture has not, though shapes fit."""
    model, stated = clip.config["model_cfg"], checkpoint.stated()
    vision = model["vision_cfg"]
    built = {
        "quick_gelu": bool(model.get("quick_gelu")),
        "heads": vision.get("width", 768) // vision.get("head_width", 64),
        "layer_norm_eps": 1e-5,
    }
    for key in ("heads", "layer_norm_eps"):
        if key in stated and stated[key] != built[key]:
            raise AdamergeError(
                f"{checkpoint.source} was trained with {key} = {stated[key]} in its image tower, "
                f"{architecture} has {built[key]}, though all shapes fit: set suite.architecture "
                "to the model it was trained as"
            )
    if "activation" in stated:
        raise AdamergeError(
            f"{checkpoint.source} was trained with the activation {stated['activation']}, which "
            f"{architecture} has not, though all shapes fit: set suite.architecture to the model "
            "it was trained as"
        )
    if stated.get("quick_gelu", built["quick_gelu"]) != built["quick_gelu"]:
        raise other_activation(checkpoint.source, architecture, stated["quick_gelu"])
