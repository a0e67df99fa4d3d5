"""Encoders: anything called as `encoder(images [B, 3, H, W], task_ids [B]) -> features [B, D]`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adamerge.encoders.experts import Experts, PerTaskEncoder
from adamerge.encoders.tower import FoldedEncoder, Tower, merged_encoder, static_encoder

if TYPE_CHECKING:
    from adamerge.encoders.clip import Clip, Normalizer, build_backbone, build_clip

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
    if name in __all__:
        return getattr(importlib.import_module("adamerge.encoders.clip"), name)
    raise AttributeError(f"module 'adamerge.encoders' has no attribute {name!r}")
