"""Encoders: anything called as `encoder(images [B, 3, H, W], task_ids [B]) -> features [B, D]`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adamerge.encoders.clip import Clip, Normalizer, build_backbone, build_clip
    from adamerge.encoders.experts import Experts, PerTaskEncoder
    from adamerge.encoders.tower import FoldedEncoder, Tower, merged_encoder, static_encoder

_HOMES = {
    **dict.fromkeys(("Clip", "Normalizer", "build_backbone", "build_clip"), "clip"),
    **dict.fromkeys(("Experts", "PerTaskEncoder"), "experts"),
    **dict.fromkeys(("FoldedEncoder", "Tower", "merged_encoder", "static_encoder"), "tower"),
}

__all__ = [
    "Clip",
    "Experts",
    "FoldedEncoder",
    "Normalizer",
    "PerTaskEncoder",
    "Tower",
    "build_backbone",
    "build_clip",
    "merged_encoder",
    "static_encoder",
]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that towers do without open_clip."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"adamerge.encoders.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'adamerge.encoders' has no attribute {name!r}")
