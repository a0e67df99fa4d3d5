"""A grid of settings: every combination of values, by commas on the command line or in a YAML."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adamerge._base.errors import AdamergeError
from adamerge.config import settings as config

_FILES = ("suite=", "method=")  # which decide whether a run learns by itself
_STEPS = "trainer.max_steps"
_FILES_BESIDE = (".html", ".md", ".csv", ".json", ".yaml", ".lock", ".log")  # the runs' folders
_MOST_RUNS = 10_000  # of a grid: more is a slip


class Recipe(NamedTuple):
    """One run of a grid: its name ("" on the command line), its settings as `key=value`, the name
    of the recipe whose merge it goes on from, or "", and the keys that it sets for itself alone."""

    name: str
    words: list[str]
    base: str
    own: Collection[str] = ()

    @property
    def values(self) -> dict[str, str]:
        """Its settings by key."""
        return {key: value for key, _, value in (word.partition("=") for word in self.words)}


def read_grid(words: Sequence[str]) -> list[Recipe]:
    """The runs of `key=value,value …`, or of a YAML's path with words that go over it.

    Values that are given twice count once; of a key that is, the last values count.

    Raises:
        AdamergeError: a value is empty, there are more than 10,000 runs, or the file cannot be
            read as a grid.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise AdamergeError(
            f"{files[1]!r} is no setting: expected key=value after the grid's YAML {files[0]}"
        )
    return _of_file(Path(files[0]), words) if files else _of_words(words)


def _of_words(words: Sequence[str]) -> list[Recipe]:
    """Every combination of the values that commas separate."""
    choices: dict[str, list[str]] = {}
    for word in words:
        key, _, value = word.partition("=")
        choices[key] = [f"{key}={part}" for part in _parts(value)]
    return [Recipe("", chosen, "") for chosen in _products(choices.values(), "the grid")]


def _products(choices: Iterable[Sequence[str]], what: str) -> Iterator[list[str]]:
    """Every combination of words, those apart that say the same in other letters."""
    apart = [[*{repr(config.key_and_value(w)): w for w in words}.values()] for words in choices]
    count = math.prod(map(len, apart))
    if count > _MOST_RUNS:
        raise AdamergeError(
            f"{what} stands for {count} runs: expected {_MOST_RUNS} at most; give fewer values"
        )
    return map(list, itertools.product(*apart))


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
    content = config.read_yaml(path)
    recipes = content.pop("recipes", None)
    if not isinstance(recipes, dict) or not all(isinstance(r, dict) for r in recipes.values()):
        raise AdamergeError(f"{path} is no grid: {expected}")
    over = [word for word in words if "=" in word]
    shared = _flat(content)
    shared |= {word.partition("=")[0]: _parts(word.partition("=")[2]) for word in over}
    grid: list[Recipe] = []
    for name, settings in recipes.items():
        base = str(settings.pop("base", "") or "")
        if base and base not in list(recipes)[: list(recipes).index(name)]:
            raise AdamergeError(
                f"{path}: recipe {name} has base: {base}, which is no recipe above it: expected "
                "the name of one"
            )
        own = _flat(settings)
        choices = [
            [f"{key}={_word(path, v)}" for v in (values if isinstance(values, list) else [values])]
            for key, values in {**shared, **own}.items()
        ]
        grid += [
            Recipe(str(name), chosen, base, tuple(own))
            for chosen in _products(choices, f"recipe {name} of {path}")
        ]
    return grid


def left_static(grid: Sequence[Recipe]) -> tuple[list[Recipe], str]:
    """The grid with objectives and steps that are set for all runs left out of those that learn
    nothing by themselves (tsv_m, regmean …), and a sentence on it; "" where nothing is left out.

    Whoever compares these with methods that learn wants them as published. Where no run of a grid
    learns by itself, its steps are for them.
    """
    known: dict[tuple[str, ...], str] = {}

    def left(recipe: Recipe) -> set[str]:
        """The keys that are left out of a run."""
        values, files = recipe.values, tuple(w for w in recipe.words if w.startswith(_FILES))
        if files not in known:
            known[files] = str(config.load(files)["trainer"]["max_steps"])
        steps = values[_STEPS] if _STEPS in recipe.own else known[files]
        keys = {"objective"} if values.get(_STEPS) == "0" else {"objective", _STEPS}
        return (keys & {*values}) - {*recipe.own} if steps == "0" else set()

    pairs = [(recipe, left(recipe)) for recipe in grid]
    if all(_STEPS in keys for _, keys in pairs) or not any(keys for _, keys in pairs):
        return list(grid), ""
    found: list[Recipe] = []
    for recipe, keys in pairs:
        words = [word for word in recipe.words if word.partition("=")[0] not in keys]
        kept = recipe._replace(words=words)
        found += [kept] if kept not in found else []
    methods = dict.fromkeys(recipe.values["method"] for recipe, keys in pairs if keys)
    settings = sorted(set().union(*(keys for _, keys in pairs)))
    return found, (
        f"methods that learn nothing by themselves ({', '.join(methods)}) run without the grid's "
        f"{' and '.join(settings)}; to learn on top of one, give it a recipe with {_STEPS} in a "
        "grid's YAML"
    )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`trainer: {max_steps: 3}` as `trainer.max_steps: 3`; parts with a `_target_` are whole."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        parts = isinstance(value, dict) and "_target_" not in value and key not in config.GROUPS
        found |= {f"{key}.{name}": v for name, v in value.items()} if parts else {str(key): value}
    return found


def _word(path: Path, value: Any) -> str:
    """A value as `key=value` takes it."""
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except TypeError as error:
        raise AdamergeError(
            f"{path} has {str(value)[:60]}, which is no setting: expected texts, numbers, lists or "
            "mappings"
        ) from error


def folder_names(grid: Sequence[Recipe]) -> list[str]:
    """A folder's name for every run: its recipe's, and what differs among the runs called so."""
    names = []
    for recipe in grid:
        alike = [other.values for other in grid if other.name == recipe.name]
        parts = [recipe.name] if recipe.name else []
        for key, value in recipe.values.items():
            if all(other.get(key, value) == value for other in alike):
                continue
            file = key in config.GROUPS  # a name, or the path of one
            short = "seed" if key == "seed" else f"{key.rpartition('.')[2]}="
            parts.append(Path(value).stem if file else f"{short}{value}")
        name = re.sub(r"[^\w.=+-]+", "-", "-".join(parts)).lstrip(".") or "run"
        names.append(f"{name}-run" if name.endswith(_FILES_BESIDE) else name)
    return [
        name if names.count(name) == 1 else f"{name}-{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]
