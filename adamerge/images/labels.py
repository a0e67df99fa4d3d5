"""A data set's labels as class numbers of the suite."""

from __future__ import annotations

import difflib
import logging
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
    missing = sum(value in (None, -1) or value != value for value in values)  # or not a number
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


def _integers(task: str, column: str, values: Sequence[Any], count: int) -> np.ndarray:
    try:
        given = np.asarray(values)
        with np.errstate(invalid="ignore"):  # of numbers too large, refused below
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
    names = list(dict.fromkeys(values))
    places = dict(zip(names, _places(task, names, classes), strict=True))
    unknown = [name for name, place in places.items() if place is None]
    if unknown:
        shown = ", ".join(f"{name!r}{nearest(name, classes)}" for name in unknown[:3])
        raise AdamergeError(
            f"labels of task {task!r} (column {column!r}, of a folder of images its class folders):"
            f" {len(unknown)} of {len(names)} names are not among its classes, such as {shown}; "
            f"its classes are {_shown(classes)}: name the folders (or labels) as the suite's "
            f"classes, or by class number from 0 to {len(classes) - 1}, or set label: null to use "
            "none"
        )
    return np.array([places[name] for name in values], dtype=np.int64)


def _places(task: str, names: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """The class of each name: the same, or that with the same letters where it is the only one.

    Where none is a class and all are numbers, these: from 0, or exactly 1 to the count of classes.
    """
    plain = [_plain(name) for name in classes]
    places = {name: i for i, name in enumerate(plain) if name and plain.count(name) == 1}
    exact = {name: i for i, name in enumerate(classes)}
    matched = [exact.get(name, places.get(_plain(name))) for name in names]
    numbered = all(re.fullmatch("[0-9]{1,9}", name) for name in names)
    if not numbered or any(place is not None for place in matched):
        return matched
    numbers, count = [int(name) for name in names], len(classes)
    if 0 in numbers and len({*numbers}) == len(numbers) and max(numbers) < count:
        return [*numbers]
    if sorted(numbers) == list(range(1, count + 1)):
        log.warning(
            "task %s: its labels are named 1 to %d: 1 is taken for the first class, %d for the "
            "last",
            task, count, count,
        )  # fmt: skip
        return [number - 1 for number in numbers]
    return matched


def _translation(task: str, names: Sequence[str], classes: Sequence[str]) -> np.ndarray | None:
    """For each of the data set's class numbers the suite's, or None where they are the same."""
    places = _places(task, names, classes)
    known = [place for place in places if place is not None]
    if len(names) == len(known) == len({*known}):
        moved = [i for i, place in enumerate(known) if place != i]
        if not moved:
            return None
        log.info(
            "task %s: the data set's classes are not in the suite's order (%r is its number %d and "
            "the suite's %d): labels are matched by name",
            task, names[moved[0]], moved[0], known[moved[0]],
        )  # fmt: skip
        return np.array(known, dtype=np.int64)
    if len(names) != len(classes):
        raise AdamergeError(
            f"head of task {task!r} has {len(classes)} classes, but its data set has {len(names)} "
            f"({_shown(names)}): give the suite the data set's own class names, in its order"
        )
    elsewhere = [(i, place) for i, place in enumerate(places) if place is not None and place != i]
    if not elsewhere and len(names) <= _COMPARED:
        close = [_closest(name, i, classes) for i, name in enumerate(names)]
        elsewhere = [(i, place) for i, place in enumerate(close) if place != i]
    if elsewhere:
        number, place = elsewhere[0]
        log.warning(
            "task %s: the data set's class %d is %r, the suite's is %r, but %r is more like it: "
            "labels keep the data set's numbers; check that both lists have one order, or give the "
            "suite the data set's names",
            task, number, names[number], classes[number], classes[place],
        )  # fmt: skip
    else:
        pairs = [f"{name} = {ours}" for name, ours in zip(names, classes, strict=True)]
        log.info(
            "task %s: the data set words its classes in its own way, and its own order is used: %s",
            task, _shown(pairs),
        )  # fmt: skip
    return None


def _closest(name: str, number: int, classes: Sequence[str]) -> int:
    """The place of the class most like a name: `number`, unless another is clearly more so."""
    plain = [_plain(one) for one in classes]
    alike = difflib.SequenceMatcher(None, plain[number], _plain(name)).ratio()
    cutoff = min(max(0.75, alike + 1e-3), 1.0)
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=cutoff)
    return plain.index(close[0]) if close and alike < 1 else number


def _shown(texts: Sequence[str]) -> str:
    return ", ".join(texts[:3]) + ", …" * (len(texts) > 3)


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if not c.isspace() and c not in "_-")
