"""A data set's labels as class numbers of the suite."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from adamerge.binding import nearest
from adamerge.errors import AdamergeError

log = logging.getLogger("adamerge")


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
        values: integers, booleans (False is 0), or class names; None and -1 mean no label.
        names: the data set's own class names, where its integers are numbers of those. Where each
            of them is one of `classes` (whatever its case, spaces, `_` and `-`), labels are
            matched by name, so another order does no harm; else the two lists count as the same
            classes in the same order, worded differently.
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
    unknown = [name for name in dict.fromkeys(values) if _place(name, places) is None]
    if unknown:
        shown = ", ".join(f"{name!r}{nearest(name, classes)}" for name in unknown[:3])
        raise AdamergeError(
            f"labels of task {task!r} (column {column!r}): {len(unknown)} of the names are not "
            f"among its classes, such as {shown}: give the suite's classes these names, or mend "
            "the labels"
        )
    return np.array([_place(name, places) for name in values], dtype=np.int64)


def _translation(task: str, names: Sequence[str], classes: Sequence[str]) -> np.ndarray | None:
    """For each of the data set's class numbers the suite's, or None where they are the same."""
    places = _places(classes)
    found = [_place(name, places) for name in names]
    known = [place for place in found if place is not None]
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
            f"({', '.join(names[:3])}{', …' * (len(names) > 3)}): "
            "give the suite the data set's own class names, in its order"
        )
    astray = [i for i, place in enumerate(found) if place is not None and place != i]
    if astray:
        log.warning(
            "task %s: the data set's class %d is %r, the suite's is %r: labels keep the data "
            "set's numbers; check that both lists have one order",
            task, astray[0], names[astray[0]], classes[astray[0]],
        )  # fmt: skip
    return None


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if not c.isspace() and c not in "_-")


def _places(classes: Sequence[str]) -> dict[str, int]:
    """Where each class stands, by its exact name and by its plain one where that is unambiguous."""
    plain = [_plain(name) for name in classes]
    places = {f"~{name}": i for i, name in enumerate(plain) if name and plain.count(name) == 1}
    return {**places, **{f"={name}": i for i, name in enumerate(classes)}}


def _place(name: str, places: dict[str, int]) -> int | None:
    return places.get(f"={name}", places.get(f"~{_plain(name)}"))
