"""Pickled modules whose classes are not there: their state dicts, and what they were made with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from adamerge._base.errors import AdamergeError
from adamerge.weights.formats.pickled import Standin, TensorRef

_DEEPEST, _MOST_PARTS = 64, 100_000  # modules and tensors; CLIP has 8 levels, some 500
_ACTIVATIONS = ("gelu", "act", "activation")  # what the MLP of a block calls its own


def is_module(value: Any) -> bool:
    """Whether it is a pickled `nn.Module`, or one of TorchScript."""
    if not isinstance(value, Standin) or value.called:
        return False
    return value.path.startswith("__torch__.") or "_parameters" in _mapping(value.state)


def module_tensors(module: Standin) -> dict[str, TensorRef | Standin]:
    """The state dict of a pickled `nn.Module` whose class is not there: dotted name -> tensor.

    Follows `_parameters`, `_buffers` (persistent ones) and `_modules`, and the plain attributes
    of a TorchScript object. A stand-in is a tensor that a call makes which nobody knows.

    Raises:
        AdamergeError: modules nested deeper than any real one, or within themselves.
    """
    return {
        name: value
        for name, value in _walk(module, "", itertools.count())
        if isinstance(value, TensorRef) or value.called
    }


def module_settings(module: Standin) -> dict[str, Any]:
    """What the blocks of a pickled image tower were made with, where all agree.

    Returns:
        `quick_gelu`, `heads`, `layer_norm_eps`, `activation` (where it is no GELU); and of a head
        `normalize`.
    """
    parts = [(n, v) for n, v in _walk(module, "", itertools.count()) if isinstance(v, Standin)]
    blocks = [(name, part) for name, part in parts if ".resblocks." in f".{name}"]
    visual = [(name, part) for name, part in blocks if ".visual." in f".{name}"]
    stated: dict[str, list[Any]] = {}
    for name, part in visual or blocks:
        kind, state = part.path.rpartition(".")[2], _mapping(part.state)
        if name.rpartition(".")[2] in _ACTIVATIONS:
            gelu = kind in ("GELU", "QuickGELU")
            key, value = ("quick_gelu", kind == "QuickGELU") if gelu else ("activation", kind)
            stated.setdefault(key, []).append(value)
        elif kind == "MultiheadAttention":
            stated.setdefault("heads", []).append(state.get("num_heads"))
        elif kind.startswith("LayerNorm"):
            stated.setdefault("layer_norm_eps", []).append(state.get("eps"))
    settings = {
        key: values[0] for key, values in stated.items() if values.count(values[0]) == len(values)
    }
    settings["normalize"] = _mapping(module.state).get("normalize")
    return {key: value for key, value in settings.items() if value is not None}


def _walk(
    module: Standin, prefix: str, visits: Iterator[int]
) -> Iterator[tuple[str, TensorRef | Standin]]:
    """Everything in a module by its dotted name."""
    for part in _parts(module):
        for name, value in part.items():
            if next(visits) > _MOST_PARTS or prefix.count(".") > _DEEPEST:
                raise AdamergeError(
                    f"a pickled {module.path} nests modules deeper than any model, or within "
                    "themselves: it is damaged or made to harm; save a state dict"
                )
            if isinstance(value, TensorRef | Standin):
                yield f"{prefix}{name}", value
            if isinstance(value, Standin):
                yield from _walk(value, f"{prefix}{name}.", visits)


def _parts(module: Standin) -> list[Mapping[Any, Any]]:
    state = _mapping(module.state)
    if module.path.startswith("__torch__."):
        return [state]
    hidden = state.get("_non_persistent_buffers_set")
    hidden = hidden if isinstance(hidden, list) else []
    buffers = {k: v for k, v in _mapping(state.get("_buffers")).items() if k not in hidden}
    return [_mapping(state.get("_parameters")), buffers, _mapping(state.get("_modules"))]


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}
