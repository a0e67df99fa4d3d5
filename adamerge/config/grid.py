"""A grid of settings: every combination of values, by commas on the command line or in a YAML."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from adamerge._base.errors import AdamergeError, one_line
from adamerge.report.comparison.runs import differing


class Recipe(NamedTuple):
    """One run of a grid: its name ("" on the command line), its settings as `key=value`, and the
    name of the recipe whose merge it goes on from, or ""."""

    name: str
    words: list[str]
    base: str


def read_grid(words: Sequence[str]) -> list[Recipe]:
    """The runs of `key=value,value …`, or of a YAML's path with words that go over it.

    Raises:
        AdamergeError: a value is empty, or the file cannot be read as a grid.
    """
    files = [word for word in words if "=" not in word]
    return _of_file(Path(files[0]), words) if files else _of_words(words)


def _of_words(words: Sequence[str]) -> list[Recipe]:
    """Every combination of the values that commas separate."""
    choices = []
    for word in words:
        key, _, value = word.partition("=")
        choices.append([f"{key}={part}" for part in _parts(value)])
    return [Recipe("", list(chosen), "") for chosen in itertools.product(*choices)]


def _parts(value: str) -> list[str]:
    """`a,b` is two values; `[a,b]`, `{a: 1, b: 2}` and quoted text are one."""
    if value[:1] in ("[", "{", '"', "'"):
        return [value]
    parts = [part.strip() for part in value.split(",")]
    if len(parts) > 1 and "" in parts:
        raise AdamergeError(f"'{value}' has an empty value between commas: leave it out")
    return parts


def _of_file(path: Path, words: Sequence[str]) -> list[Recipe]:
    """A YAML of settings for all, whose lists make a grid, and of `recipes` by name.

    Words after the path go over the settings for all.
    """
    expected = "expected settings, and recipes: with a mapping of settings for every name"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = one_line(error, 150)
        raise AdamergeError(f"{path} cannot be read as a grid ({reason}): {expected}") from error
    recipes = content.pop("recipes", None) if isinstance(content, dict) else None
    if not isinstance(recipes, dict) or not all(isinstance(r, dict) for r in recipes.values()):
        raise AdamergeError(f"{path} is no grid: {expected}")
    over = [word for word in words if "=" in word]
    shared = {str(k): v for k, v in content.items()}
    shared |= {word.partition("=")[0]: _parts(word.partition("=")[2]) for word in over}
    grid: list[Recipe] = []
    for name, settings in recipes.items():
        base = str(settings.pop("base", "") or "")
        if base and base not in list(recipes)[: list(recipes).index(name)]:
            raise AdamergeError(
                f"{path}: recipe {name} has base: {base}, which is no recipe above it: expected "
                "the name of one"
            )
        choices = [
            [f"{key}={_word(v)}" for v in (values if isinstance(values, list) else [values])]
            for key, values in {**shared, **settings}.items()
        ]
        grid += [Recipe(str(name), list(chosen), base) for chosen in itertools.product(*choices)]
    return grid


def _word(value: Any) -> str:
    """A value as `key=value` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def folder_names(grid: Sequence[Recipe], flats: Sequence[Mapping[str, Any]]) -> list[str]:
    """A folder's name for every run: its recipe's, and what differs among the runs called so.

    Args:
        flats: the settings of every run, flat.
    """
    inner = re.compile(r"(method|objective|suite)\.(?!name$)")
    slots = {"method.name": "", "objective.name": "", "suite.name": "", "seed": "seed"}
    names = []
    for recipe, values in zip(grid, flats, strict=True):
        alike = [f for f, other in zip(flats, grid, strict=True) if other.name == recipe.name]
        keys = [key for key in differing(alike) if not inner.match(key)]
        parts = [recipe.name] if recipe.name else []
        for key in keys:
            parts.append(f"{slots.get(key, key.rpartition('.')[2] + '=')}{values.get(key)}")
        names.append(re.sub(r"[^\w.=+-]+", "-", "-".join(parts) or "run"))
    return [
        name if names.count(name) == 1 else f"{name}-{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]
