"""Labels of every kind become the suite's class numbers, or one sentence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from adamerge import AdamergeError
from adamerge.labels import class_numbers

CLASSES = ("annual crop", "forest", "sea or lake")


def numbers(values: Sequence[Any], names: list[str] | None = None) -> list[int] | None:
    found = class_numbers("t", "label", values, names, CLASSES)
    return None if found is None else found.tolist()


def test_integers_booleans_and_whole_floats() -> None:
    assert numbers([2, 0, 1]) == [2, 0, 1]
    assert numbers([True, False]) == [1, 0]
    assert numbers([2.0, 1.0]) == [2, 1]


def test_names_whatever_their_case_and_spacing() -> None:
    assert numbers(["forest", "AnnualCrop", "Sea_or-lake", "annual crop"]) == [1, 0, 2, 0]


def test_classes_that_differ_in_case_only_are_matched_exactly() -> None:
    found = class_numbers("t", "label", ["b", "B", "b"], None, ("B", "b"))
    assert found is not None and found.tolist() == [1, 0, 1]


def test_unknown_names_are_listed_with_the_nearest_class() -> None:
    message = (
        r"column 'label'\): 4 of the names are not among its classes, such as 'forrest' \(did you "
        r"mean 'forest'\?\), 'x', 'y': give"
    )
    with pytest.raises(AdamergeError, match=message):
        numbers(["forest", "forrest", "x", "y", "z"])


def test_named_numbers_in_another_order_are_mended(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adamerge")
    assert numbers([0, 1, 2], ["Sea_or_lake", "annual_crop", "forest"]) == [2, 0, 1]
    assert "('Sea_or_lake' is its number 0 and the suite's 2): labels are matched" in caplog.text


def test_named_numbers_of_some_of_the_classes() -> None:
    assert numbers([0, 1], ["forest", "sea or lake"]) == [1, 2]


def test_named_numbers_in_other_words_keep_their_order(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adamerge")
    assert numbers([0, 2], ["crops", "forest", "water"]) == [0, 2]
    assert not caplog.text
    assert numbers([0, 2], ["crops", "water", "forest"]) == [0, 2]
    assert "class 2 is 'forest', the suite's is 'sea or lake': labels keep" in caplog.text
    with pytest.raises(
        AdamergeError, match=r"has 3 classes, but its data set has 2 \(crops, water\): give"
    ):
        numbers([0, 1], ["crops", "water"])


@pytest.mark.parametrize("value", [None, -1])
def test_rows_without_labels(value: int | None) -> None:
    assert numbers([value] * 4) is None
    assert numbers([value] * 4, list(CLASSES)) is None
    message = r"missing \(None or -1\) in 1 of 3 rows: .* set data.label to null"
    with pytest.raises(AdamergeError, match=message):
        numbers([0, value, 1])


@pytest.mark.parametrize("values", [[0.5, 1.0], [[0], [1]], [{"a": 1}], ["forest", 1], [1e300]])
def test_what_is_no_label(values: list[Any]) -> None:
    with pytest.raises(
        AdamergeError, match=r"are not class numbers: expected integers from 0 to 2"
    ):
        numbers(values)


def test_out_of_range() -> None:
    with pytest.raises(AdamergeError, match="run from 0 to 3, but its head has 3 classes"):
        numbers([0, 3])
