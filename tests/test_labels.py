"""Labels of every kind become the suite's class numbers, or one sentence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from adamerge import AdamergeError
from adamerge.images.labels import class_numbers

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
        r"class folders\): 4 of 5 names are not among its classes, such as 'forrest' \(did you "
        r"mean 'forest'\?\), 'x', 'y'; its classes are annual crop, forest, sea or lake: name the "
        r"folders .* by class number from 0 to 2, or set label: null"
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
    assert "own order is used: crops = annual crop, forest = forest, water = sea or " in caplog.text
    assert numbers([0, 2], ["crops", "water", "forest"]) == [0, 2]
    assert "class 2 is 'forest', the suite's is 'sea or lake', but 'forest' is more" in caplog.text
    with pytest.raises(
        AdamergeError, match=r"has 3 classes, but its data set has 2 \(crops, water\): give"
    ):
        numbers([0, 1], ["crops", "water"])


def test_a_data_sets_near_miss_of_another_order_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "adamerge")
    found = class_numbers("t", "label", [0, 1], ["cats", "dogs"], ("dog", "cat"))
    assert found is not None and found.tolist() == [0, 1]
    assert "class 0 is 'cats', the suite's is 'dog', but 'cat' is more like it" in caplog.text
    caplog.clear()
    class_numbers("t", "label", [0, 1], ["dogs", "cats"], ("dog", "cat"))
    class_numbers("t", "label", [0, 1], ["SeaLake", "AnnualCrop"], ("sea or lake", "annual land"))
    assert not caplog.text


def test_folders_in_other_words_are_refused() -> None:
    """Their order is that of the alphabet, which says nothing of the classes."""
    with pytest.raises(AdamergeError, match=r"2 of 2 names are not .*'cats' \(did you mean 'cat'"):
        class_numbers("t", "label", ["cats", "dogs"], None, ("dog", "cat"))


TWELVE = tuple(f"kind {letter}" for letter in "lkjihgfedcba")


def test_names_that_are_numbers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "adamerge")

    def found(values: Sequence[Any], names: list[str] | None = None) -> list[int]:
        result = class_numbers("t", "label", values, names, TWELVE)
        assert result is not None
        return result.tolist()

    assert found(["0", "10", "2", "11"]) == [0, 10, 2, 11]
    assert found(["00000", "00010"]) == [0, 10]
    as_text = sorted(map(str, range(12)))
    assert found([0, 1, 2, 11], as_text) == [0, 1, 10, 9]
    assert not caplog.text
    from_one = [str(number) for number in range(1, 13)]
    assert found(from_one) == list(range(12))
    assert "named 1 to 12: 1 is taken for the first class, 12 for the last" in caplog.text
    assert found([0, 1, 2], sorted(from_one)) == [0, 9, 10]
    for names in (["1", "2"], ["0", "12"], ["0", "00"], ["0", "kind a"], ["2020", "2021"]):
        with pytest.raises(AdamergeError, match="by class number from 0 to 11, or set label: null"):
            found(names)


def test_classes_that_are_numbers_are_matched_by_name() -> None:
    one = class_numbers("t", "label", ["1", "2"], None, ("1", "2", "3"))
    assert one is not None and one.tolist() == [0, 1]
    with pytest.raises(AdamergeError, match=r"1 of 2 names are not among its classes, such as '0'"):
        class_numbers("t", "label", ["0", "1"], None, ("1", "2", "3"))


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
