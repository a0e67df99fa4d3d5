"""Dotted paths in a configuration: found, checked to be what they claim, bound to arguments."""

from __future__ import annotations

import difflib
import importlib
import importlib.machinery
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from adamerge._base.errors import AdamergeError

_INSTALLED = {"site-packages", "dist-packages"}
Kind = Callable[[Any], bool]


def subclass_of(base: type) -> Kind:
    """Accepts classes derived from `base`, itself excluded."""
    return lambda value: inspect.isclass(value) and issubclass(value, base) and value is not base


def function_to(*results: Any) -> Kind:
    """Accepts functions whose return annotation is one of `results`."""

    return lambda value: (
        inspect.isfunction(value) and typing.get_type_hints(value).get("return") in results
    )


def nearest(word: object, words: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no word is close."""
    close = difflib.get_close_matches(str(word), list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def find(path: str, key: str, kind: Kind, expected: str) -> Any:
    """The object at a dotted path, if it is of the expected kind.

    The kind is checked before anything is called, so that a configuration cannot name an arbitrary
    function to run.

    Raises:
        AdamergeError: nothing at the path, or something of another kind.
    """
    module_name, _, name = path.rpartition(".")
    parts = path.split(".")
    # To import some of these is to run a program; none holds what a configuration can name.
    if parts[0] in sys.stdlib_module_names or any(part.startswith("__") for part in parts):
        raise AdamergeError(f"{key}._target_: {path!r} is not {expected}")
    try:
        module = importlib.import_module(module_name) if module_name else None
    except (Exception, SystemExit) as error:  # whatever the user's own module raises
        why = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        why = " ".join(why.split())[:200]
        raise AdamergeError(f"{key}._target_: cannot import {path!r} ({why})") from error
    target = getattr(module, name, None)
    if target is None:
        raise AdamergeError(
            f"{key}._target_: nothing at {path!r}{nearest(name, dir(module) if module else ())}; "
            f"expected the dotted path of {expected}"
        )
    if not kind(target):
        raise AdamergeError(f"{key}._target_: {path!r} is not {expected}")
    return target


def code_beside(config: Any, file: Path) -> None:
    """Refuses `_target_`s of a file that lead to code which came with it; imports nothing.

    That is code in or below the file's folder, or in the package that the file lies in. Free are
    what is installed, what this process has imported, and a folder that PYTHONPATH names.

    Args:
        config: the content of the file.

    Raises:
        AdamergeError: naming the code.
    """
    folder = file.resolve().parent
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    chosen = {entry for entry in named if os.path.isabs(entry) and Path(entry).resolve() == folder}
    endings = ("", *importlib.machinery.all_suffixes())
    for target in _targets(config):
        top = target.partition(".")[0]
        if top in ("", "adamerge") or top in sys.modules:
            continue
        entries = [e for e in sys.path if e not in chosen and not _INSTALLED & {*Path(e).parts}]
        for place in (Path(entry, f"{top}{ending}") for entry in entries for ending in endings):
            code = place.resolve()
            if place.exists() and (folder in code.parents or code in (folder, *folder.parents)):
                raise AdamergeError(
                    f"{file}: _target_ {target!r} would run {code}, which lies with that file and "
                    "may have come with it: nothing of it is run; if it is yours, move one of them "
                    "to another folder, or install it"
                )


def _targets(value: Any) -> Iterator[str]:
    """Every `_target_` in a configuration, at any depth."""
    if isinstance(value, Mapping):
        if isinstance(value.get("_target_"), str):
            yield value["_target_"]
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from _targets(part)


def problems(
    target: Callable[..., Any], arguments: Mapping[str, Any], key: str, supplied: Iterable[str]
) -> list[str]:
    """What is wrong with calling `target` so: unknown, missing or mistyped arguments.

    Args:
        supplied: the names the builder gives (`backbone`, `heads`, …) where they are asked for.
    """
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    settable = {n: p for n, p in parameters.items() if p.kind in named and n not in {*supplied}}
    wrong = [
        f"{key}.{name} is unknown{nearest(name, settable)}"
        for name in arguments
        if name not in settable and not open_ended
    ]
    for name, parameter in settable.items():
        if parameter.default is inspect.Parameter.empty and name not in arguments:
            wrong.append(f"{key}.{name} is missing")
    hints = _hints(target)
    for name, value in arguments.items():
        if name in hints and not fits(value, hints[name]):
            wrong.append(f"{key}.{name} is {value!r}: expected {describe(hints[name])}")
    return wrong


def call(
    target: Callable[..., Any], arguments: Mapping[str, Any], supplied: Mapping[str, Any]
) -> Any:
    """Calls `target` with its arguments and those of the supplied ones that it names."""
    names = inspect.signature(target).parameters
    return target(**{n: v for n, v in supplied.items() if n in names}, **arguments)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain configuration value can be of an annotated type; unknown types accept all."""
    options = _options(hint)
    if any(value in _choices(option) for option in options):
        return True
    options = {option for option in options if not _choices(option)}
    plain = {bool, int, float, str, type(None)}
    if not plain & options or type(value) not in plain:
        return not options <= plain  # only a plain type says no to a list or a dictionary
    return type(value) in options or (type(value) is int and float in options)


def describe(hint: Any) -> str:
    """A type for a message: `float or none`."""
    words: list[str] = []
    for option in _options(hint):
        name = "none" if option is type(None) else getattr(option, "__name__", str(option))
        words += [repr(value) for value in _choices(option)] or [name]
    return " or ".join(words)


def _options(hint: Any) -> Set[Any]:
    """The types of a union, in its order; of another type, that alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return dict.fromkeys(typing.get_args(hint) if union else (hint,)).keys()


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # an annotation that cannot be resolved says nothing
        return {}
