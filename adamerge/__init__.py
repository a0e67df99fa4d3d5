"""adamerge: merge fine-tuned experts into one model by learning how to merge, without labels."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adamerge import align, encoders, methods, transforms
    from adamerge._base.errors import AdamergeError
    from adamerge.encoders import heads
    from adamerge.export.load import load
    from adamerge.learn import objectives
    from adamerge.learn.adapt import adapt
    from adamerge.learn.adaptation import Adaptation
    from adamerge.learn.step import step_loss
    from adamerge.weights.task_vectors import TaskVectors

__version__ = "0.1.0"

_HOMES = {
    "Adaptation": "adamerge.learn.adaptation",
    "AdamergeError": "adamerge._base.errors",
    "TaskVectors": "adamerge.weights.task_vectors",
    "adapt": "adamerge.learn.adapt",
    "load": "adamerge.export.load",
    "step_loss": "adamerge.learn.step",
}
_PACKAGES = ("align", "encoders", "methods", "transforms")
# Modules by short names: in `import adamerge.heads`, and in `_target_`s of configurations, of
# which some were written by earlier versions.
_SHORT = {
    "heads": "adamerge.encoders.heads",
    "objectives": "adamerge.learn.objectives",
    "demo_images": "adamerge.images.demo",
}

__all__ = [
    "AdamergeError",
    "Adaptation",
    "TaskVectors",
    "adapt",
    "align",
    "encoders",
    "heads",
    "load",
    "methods",
    "objectives",
    "step_loss",
    "transforms",
]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `adamerge --help` does not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"adamerge.{name}")
    if name in _SHORT:
        return importlib.import_module(_SHORT[name])
    raise AttributeError(f"module 'adamerge' has no attribute {name!r}")


class _Short(ModuleType):
    """A module under a short name, imported when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # the import system looks for such names
            raise AttributeError(name)
        return getattr(self._module(), name)

    def __dir__(self) -> list[str]:
        return dir(self._module())

    def _module(self) -> ModuleType:
        return importlib.import_module(_SHORT[self.__name__.removeprefix("adamerge.")])


for _name in _SHORT:
    sys.modules[f"adamerge.{_name}"] = _Short(f"adamerge.{_name}")
