"""adamerge: merge fine-tuned experts into one model by learning how to merge, without labels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adamerge import encoders, heads, methods, objectives, transforms
    from adamerge.errors import AdamergeError
    from adamerge.loading import load
    from adamerge.task_vectors import TaskVectors

__version__ = "0.1.0"

_HOMES = {
    "TaskVectors": "adamerge.task_vectors",
    "AdamergeError": "adamerge.errors",
    "load": "adamerge.loading",
}
_MODULES = ("encoders", "heads", "methods", "objectives", "transforms")

__all__ = [
    "AdamergeError",
    "TaskVectors",
    "encoders",
    "heads",
    "load",
    "methods",
    "objectives",
    "transforms",
]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `adamerge --help` does not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"adamerge.{name}")
    raise AttributeError(f"module 'adamerge' has no attribute {name!r}")
