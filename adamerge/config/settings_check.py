"""What is wrong with a configuration, setting by setting; arguments of dotted paths aside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adamerge._base.binding import nearest
from adamerge.weights.storage_kinds import DTYPES, PLACES

Config = dict[str, Any]
# What a setting may be: one of these words, a number of a range, a value of a type, or nothing.
Kinds = tuple[str | range | type | None, ...]

GROUPS = ("suite", "method", "objective")
_OPEN = (
    "trainer",
    "optim",
)  # whose keys are arguments of something else, checked where it is known
_COUNT, _SIZE = range(1, 10**9 + 1), range(1, 2**16 + 1)
# Of settings that may be something else than values of their default's type.
_KINDS: dict[str, Kinds] = {
    **{group: (dict,) for group in GROUPS},
    "scheduler": (None, dict),
    "protocol": ("paper", "heldout"),
    "fold": (None, "dynamic", "per_task", "single"),
    "on_bad_image": ("error", "skip"),
    "seed": (range(2**32),),  # what numpy takes
    "batch_size": (_SIZE,),
    "micro_batch": (None, _SIZE),
    "num_workers": (range(1025),),
    "log_every": (_COUNT,),
    "eval_every": (range(10**9 + 1),),
    "checkpoint_every": (_COUNT,),
    "keep": ("best", "last"),
    "patience": (None, _COUNT),
    "run_dir": (None, str),
    "resume": (None, str),
    "cache_dir": (None, str),
    "task_vectors.dtype": DTYPES,
    "task_vectors.device": PLACES,
    "heads": ("frozen", "learned"),
    "update.name": ("joint", "per_task", "sam", "bilevel", "progressive"),
    "update.order": ("fixed", "shuffled"),
    "update.inner_steps": (_COUNT,),
    "trainer.max_steps": (range(10**9 + 1),),
    "trainer.devices": (range(-1, 1025), str, list),
    "trainer.precision": ("32-true", "bf16-mixed"),
    "statistics.images": (_SIZE,),
    "preflight.images": (_SIZE,),
    "evaluate.batch_size": (_SIZE,),
    "wandb.mode": ("auto", "online", "offline", "off"),
    **{f"wandb.{key}": (None, str) for key in ("entity", "group", "notes")},
}
_SAID: dict[type, str] = {list: "a list", dict: "its keys and values"}
_LONGEST = 100  # of a name that a folder is called by


def setting_problems(config: Config, defaults: Config) -> Iterator[str]:
    """Unknown keys, missing ones and mistyped values.

    Args:
        defaults: the content of `train.yaml`.
    """
    yield from _part_problems(config, defaults, "")
    yield from _name_problems(config)


def _part_problems(part: Config, defaults: Config, prefix: str) -> Iterator[str]:
    for key in part if prefix.rstrip(".") not in _OPEN else ():
        if key not in defaults:
            yield f"{prefix}{key} is unknown{nearest(key, defaults)}"
    for key, default in defaults.items():
        where, value = prefix + key, part.get(key)
        if isinstance(default, dict) and isinstance(value, dict):
            yield from _part_problems(value, default, f"{where}.") if where != "optim" else ()
        elif isinstance(default, dict):
            yield f"{where} is {value!r}: expected {', '.join(f'{where}.{k}' for k in default)}"
        elif wanted := _wanted(value, _KINDS.get(where, (type(default),))):
            yield f"{where} is {value!r}: expected {wanted}"


def _wanted(value: Any, kinds: Kinds) -> str:
    """What a value should be, or nothing where it is that."""
    for kind in kinds:
        if isinstance(kind, range) and type(value) is int:
            limit = f"most {kind[-1]}" if value > kind[-1] else f"least {kind[0]}"
            return "" if value in kind else f"at {limit}"
        if kind is float and type(value) is int:
            return ""
        if type(value) is kind or (isinstance(kind, str | None) and value == kind):
            return ""
    words = [kind for kind in kinds if isinstance(kind, str)]
    types = [int if isinstance(kind, range) else kind for kind in kinds]
    named = [_SAID.get(kind, kind.__name__) for kind in types if isinstance(kind, type)]
    return " or ".join([*words, *named]) + nearest(str(value), words)


def _name_problems(config: Mapping[str, Any]) -> Iterator[str]:
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
