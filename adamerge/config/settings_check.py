"""What is wrong with a configuration, setting by setting; arguments of dotted paths aside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from adamerge._base.binding import fits, nearest
from adamerge.learn.updates import NAMES as UPDATES
from adamerge.weights.storage_kinds import DTYPES, PLACES

Config = dict[str, Any]

GROUPS = ("suite", "method", "objective")
# Dictionaries whose keys are arguments of something else, checked where that is known.
_OPEN = ("trainer", "optim", "scheduler", "transform", *GROUPS)
_NULLABLE = {"micro_batch": int, "run_dir": str, "resume": str, "cache_dir": str, "fold": str}
_CHOICES = {
    "protocol": ("paper", "heldout"),
    "on_bad_image": ("error", "skip"),
    "fold": ("dynamic", "per_task", "single"),
    "dtype": DTYPES,
    "device": PLACES,
    "mode": ("auto", "online", "offline", "off"),
    "precision": ("32-true", "bf16-mixed"),
    "heads": ("frozen", "learned"),
    "name": UPDATES,
    "order": ("fixed", "shuffled"),
}
_RANGES = {
    "seed": (0, 2**32 - 1),  # what numpy takes
    "batch_size": (1, 2**16),
    "micro_batch": (1, 2**16),
    "num_workers": (0, 1024),
    "devices": (-1, 1024),
    "log_every": (1, 10**9),
    "eval_every": (0, 10**9),
    "checkpoint_every": (1, 10**9),
    "images": (1, 2**16),
    "max_steps": (0, 10**9),
}
_REFERENCE = re.compile(r"\$\{[^${}:]+\}")  # to another setting; a colon calls a resolver
_LONGEST = 100  # of a name that a folder is called by


def setting_problems(config: Mapping[str, Any], defaults: Config) -> list[str]:
    """Unknown keys, missing ones and mistyped values.

    Args:
        defaults: the content of `train.yaml`.
    """
    return [*_unknown(config, defaults), *_mistyped(config, defaults), *_misnamed(config)]


def shape_problems(config: Mapping[str, Any]) -> list[str]:
    """Parts that are not even keys and values, which nothing else can be said about."""
    return [
        f"{key} is {config.get(key)!r}: expected its keys and values"
        for key in (*GROUPS, "optim", "task_vectors", "trainer")
        if not isinstance(config.get(key), Mapping)
    ]


def sugar(key: str, value: Any, defaults: Config) -> tuple[str, Any]:
    """`wandb=off` means `wandb.mode=off`, `preflight=off` `preflight.enabled=false`, `update=sam`
    `update.name=sam`; YAML reads a bare `off` as false."""
    if isinstance(defaults.get(key), dict) and not isinstance(value, dict):
        switches = [name for name in ("mode", "enabled", "name") if name in defaults[key]]
        key = ".".join([key, *switches])
    if key.endswith(".mode") and isinstance(value, bool):
        value = "auto" if value else "off"
    return key, value


def filled(config: Config, defaults: Config) -> Config:
    """A saved configuration with the settings that are younger than it."""
    whole = {**defaults, **config}
    for key, value in defaults.items():
        if key != "optim" and isinstance(value, dict) and isinstance(whole[key], dict):
            whole[key] = filled(whole[key], value)  # arguments of another optimizer are its own
    return whole


def lookups(value: Any, key: str = "") -> Iterator[str]:
    """The keys of texts that are no plain text, like `${oc.env:NAME}` or what could become that.

    References to other settings must be replaced by their values before.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from lookups(str(name), key)
            yield from lookups(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from lookups(inner, f"{key}[{index}]")
    elif isinstance(value, str) and "${" in value:
        yield key


def without_references(value: Any) -> Any:
    """A copy with an x for every reference to another setting, from the innermost outwards."""
    if isinstance(value, dict):
        return {key: without_references(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_references(inner) for inner in value]
    while isinstance(value, str) and value != (shorter := _REFERENCE.sub("x", value)):
        value = shorter
    return value


def count_values(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node stands for, with what its aliases repeat.

    Args:
        known: of nodes that were counted, by identity; empty at first.
    """
    if node is None or isinstance(node.value, str):
        return 1
    if id(node) not in known:
        known[id(node)] = 10**9  # of one that holds itself
        parts = [part for item in node.value for part in (item if type(item) is tuple else (item,))]
        known[id(node)] = 1 + sum(count_values(part, known) for part in parts)
    return known[id(node)]


def _unknown(config: Mapping[str, Any], defaults: Config) -> Iterable[str]:
    for key, value in config.items():
        if key not in defaults:
            yield f"{key} is unknown{nearest(key, defaults)}"
        elif key not in _OPEN and isinstance(defaults[key], dict) and isinstance(value, dict):
            for inner in value:
                if inner not in defaults[key]:
                    yield f"{key}.{inner} is unknown{nearest(inner, defaults[key])}"


def _mistyped(config: Mapping[str, Any], defaults: Config, prefix: str = "") -> Iterable[str]:
    for key, default in defaults.items():
        value, where = config.get(key), prefix + key
        if key not in config:
            yield f"{where} is missing"
        elif key == "transform":
            if not isinstance(value, list):
                yield f"transform is {value!r}: expected a list of {{_target_: ...}}"
        elif key in ("optim", "scheduler", *GROUPS):
            continue
        elif isinstance(default, dict):
            if isinstance(value, dict):
                yield from _mistyped({**default, **value}, default, f"{where}.")
            else:
                yield f"{where} is {value!r}: expected {', '.join(f'{where}.{k}' for k in default)}"
        elif key in _NULLABLE and value is None:
            continue
        elif key in _CHOICES and value not in _CHOICES[key]:
            yield (
                f"{where} is {value!r}: expected {' or '.join(_CHOICES[key])}"
                f"{nearest(str(value), _CHOICES[key])}"
            )
        elif key != "devices" and (key in _NULLABLE or not fits(value, type(default))):
            # devices: an int, a list of devices or "auto": lightning's to judge
            wanted = _NULLABLE.get(key, type(default))
            if not fits(value, wanted):
                yield f"{where} is {value!r}: expected {wanted.__name__}"
        if key in _RANGES and isinstance(value, int):
            least, most = _RANGES[key]
            if not least <= value <= most:
                limit = f"least {least}" if value < least else f"most {most}"
                yield f"{where} is {value}: expected at {limit}"


def _misnamed(config: Mapping[str, Any]) -> Iterable[str]:
    """A run's folder is called by these names."""
    for group in GROUPS:
        part = config.get(group)
        name = part.get("name") if isinstance(part, Mapping) else "one"
        text = str(name)
        odd = name is None or isinstance(name, list | dict) or text.startswith((".", "~", "-"))
        odd = odd or text != text.strip() or not 0 < len(text) <= _LONGEST
        if odd or any(c in "/\\:" or not c.isprintable() for c in text):
            yield (
                f"{group}.name is {text[:_LONGEST]!r}, which cannot name a run's folder: expected "
                f"up to {_LONGEST} letters without /, \\ and :, and without ., - or ~ in front"
            )
