"""A data set's labels as class numbers of the suite."""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from adamerge._base.binding import nearest
from adamerge._base.errors import AdamergeError

log = logging.getLogger("adamerge")

_COMPARED = 400  # classes that are compared letter by letter: the time grows with the square


def class_numbers(
    task: str,
    column: str,
    values: Sequence[Any],
    names: Sequence[str] | None,
    classes: Sequence[str],
) -> np.ndarray | None:
    """The place of each label in `classes`, int64 `[N]`, or None when no row has a label.

    Args:
        task, column: for messages.
        values: integers, booleans (False is 0), or class names, as class folders give them; None
            and -1 mean no label. Names are matched to `classes` whatever their case, spaces, `_`
            and `-`. Where none is one of them and all are numbers, they are the classes' own:
            from 0, or exactly 1 to their count.
        names: the data set's own class names, where its integers are numbers of those. They are
            matched as names are; where they match nothing, the two lists count as the same classes
            in the same order, worded differently, and the log says so.
        classes: the suite's.

    Raises:
        AdamergeError: labels in some rows only, unknown names, other numbers of classes, or
            numbers out of range.
    """
    missing = sum(_missing(value) for value in values)
    if missing == len(values):
        log.info("task %s: no row has a label in column %r", task, column)
        return None
    if missing:
        raise AdamergeError(
            f"labels of task {task!r} (column {column!r}) are missing (None or -1) in {missing} of "
            f"{len(values)} rows: label or remove those, or set data.label to null to use none"
        )
    if all(isinstance(value, str) for value in values):
        return _by_name(task, column, values, classes)
    table = None if names is None else _translation(task, names, classes)
    upper = len(classes) if names is None else len(names)
    numbers = _integers(task, column, values, upper)
    return numbers if table is None else table[numbers]


def _missing(value: Any) -> bool:
    return value is None or value == -1 or (isinstance(value, float) and math.isnan(value))


def _integers(task: str, column: str, values: Sequence[Any], count: int) -> np.ndarray:
    try:
        given = np.asarray(values)
        with np.errstate(invalid="ignore"):  # of numbers too large, found out below
            numbers = given.astype(np.int64)
        if given.ndim != 1 or given.dtype.kind not in "biuf" or not np.array_equal(numbers, given):
            raise ValueError("not whole numbers")
    except (TypeError, ValueError, OverflowError) as error:
        raise AdamergeError(
            f"labels of task {task!r} (column {column!r}) are not class numbers: expected integers "
            f"from 0 to {count - 1}, booleans or class names"
        ) from error
    if numbers.min() < 0 or numbers.max() >= count:
        raise AdamergeError(
            f"labels of task {task!r} run from {numbers.min()} to {numbers.max()}, but its head "
            f"has {count} classes: expected labels from 0 to {count - 1}"
        )
    return numbers


def _by_name(task: str, column: str, values: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    places = _places(classes)
    names = list(dict.fromkeys(values))
    found = {name: _place(name, places) for name in names}
    unknown = [name for name in names if found[name] is None]
    if len(unknown) == len(names):
        numbers = _numbers_as_names(task, names, len(classes))
        if numbers is not None:
            return np.array([numbers[name] for name in values], dtype=np.int64)
    if unknown:
        shown = ", ".join(f"{name!r}{nearest(name, classes)}" for name in unknown[:3])
        raise AdamergeError(
            f"labels of task {task!r} (column {column!r}, of a folder of images its class folders):"
            f" {len(unknown)} of {len(names)} names are not among its classes, such as {shown}; "
            f"its classes are {_shown(classes)}: name the folders (or labels) as the suite's "
            f"classes, or by class number from 0 to {len(classes) - 1}, or set label: null to use "
            "none"
        )
    return np.array([found[name] for name in values], dtype=np.int64)


def _numbers_as_names(task: str, names: Sequence[str], count: int) -> dict[str, int] | None:
    """The class number that each name is, or None where that cannot be told for certain.

    Without a 0 they may count from 0 or from 1, unless they are exactly 1 to `count`.
    """
    if not all(re.fullmatch("[0-9]{1,9}", name) for name in names):
        return None
    numbers = {name: int(name) for name in names}
    given = sorted(numbers.values())
    if len({*given}) == len(given) and given[0] == 0 and given[-1] < count:
        return numbers
    if given == list(range(1, count + 1)):
        log.warning(
            "task %s: its labels are named 1 to %d: 1 is taken for the first class, %d for the "
            "last",
            task, count, count,
        )  # fmt: skip
        return {name: number - 1 for name, number in numbers.items()}
    return None


def _translation(task: str, names: Sequence[str], classes: Sequence[str]) -> np.ndarray | None:
    """For each of the data set's class numbers the suite's, or None where they are the same."""
    places = _places(classes)
    found = [_place(name, places) for name in names]
    known = [place for place in found if place is not None]
    if not known:  # as a folder of images gives them, in the order of texts: 0, 1, 10, 11, 2
        known = list((_numbers_as_names(task, names, len(classes)) or {}).values())
    if len(known) == len(names) and len(set(known)) == len(known):
        if known == list(range(len(known))):
            return None
        moved = next(i for i, place in enumerate(known) if place != i)
        log.info(
            "task %s: the data set's classes are not in the suite's order (%r is its number %d and "
            "the suite's %d): labels are matched by name",
            task, names[moved], moved, known[moved],
        )  # fmt: skip
        return np.array(known, dtype=np.int64)
    if len(names) != len(classes):
        raise AdamergeError(
            f"head of task {task!r} has {len(classes)} classes, but its data set has {len(names)} "
            f"({_shown(names)}): "
            "give the suite the data set's own class names, in its order"
        )
    _say_own_order(task, names, classes, found)
    return None


def _say_own_order(
    task: str, names: Sequence[str], classes: Sequence[str], found: Sequence[int | None]
) -> None:
    """One line: the data set's order is kept; a warning where names speak for another."""
    pairs = [f"{own} = {ours}" for own, ours in zip(names, classes, strict=True)]
    astray = [(i, place) for i, place in enumerate(found) if place is not None and place != i]
    if not astray and len(names) <= _COMPARED:
        close = [_closest(name, i, classes) for i, name in enumerate(names)]
        astray = [(i, place) for i, place in enumerate(close) if place != i]
    if astray:
        number, place = astray[0]
        log.warning(
            "task %s: the data set's class %d is %r, the suite's is %r, but %r is more like it: "
            "labels keep the data set's numbers; check that both lists have one order, or give the "
            "suite the data set's names",
            task, number, names[number], classes[number], classes[place],
        )  # fmt: skip
        return
    log.info(
        "task %s: the data set words its classes in its own way, and its own order is used: %s",
        task, _shown(pairs),
    )  # fmt: skip


def _closest(name: str, number: int, classes: Sequence[str]) -> int:
    """The place of the class most like a name: `number`, unless another is clearly more so."""
    plain = [_plain(one) for one in classes]
    own = difflib.SequenceMatcher(None, plain[number], _plain(name)).ratio()
    cutoff = min(max(0.75, own + 1e-3), 1.0)
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=cutoff)
    return plain.index(close[0]) if close and own < 1 else number


def _shown(texts: Sequence[str]) -> str:
    return ", ".join(texts[:3]) + ", …" * (len(texts) > 3)


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if not c.isspace() and c not in "_-")


def _places(classes: Sequence[str]) -> dict[str, int]:
    """Where each class stands, by its exact name and by its plain one where that is unambiguous."""
    plain = [_plain(name) for name in classes]
    places = {f"~{name}": i for i, name in enumerate(plain) if name and plain.count(name) == 1}
    return {**places, **{f"={name}": i for i, name in enumerate(classes)}}


def _place(name: str, places: dict[str, int]) -> int | None:
    return places.get(f"={name}", places.get(f"~{_plain(name)}"))
