"""Measurements merge over ranks into the number of the whole."""

import math

import pytest

from dovetail.observe.metrics import Max, Mean, Min, Sum, from_plain, merge, numbers, to_plain

PARTS = [
    {"loss": Mean(6.0, 3), "tokens": Sum(10), "longest": Max(4), "shortest": Min(4)},
    {"loss": Mean(1.0, 1), "tokens": Sum(5), "longest": Max(9), "shortest": Min(1), "own": Sum(2)},
]


def test_parts_of_different_sizes_merge_to_the_mean_of_the_whole():
    expected = {"loss": 7 / 4, "tokens": 15.0, "longest": 9.0, "shortest": 1.0, "own": 2.0}
    assert numbers(merge(PARTS)) == expected
    assert numbers(merge(reversed(PARTS))) == expected


def test_a_mean_of_nothing_is_nan_and_plain_numbers_pass():
    assert math.isnan(numbers({"a": Mean(0.0, 0)})["a"])
    assert numbers({"a": 3}) == {"a": 3.0}


def test_nan_is_never_lost_in_an_extreme():
    for first, second in ((math.nan, 1.0), (1.0, math.nan)):
        assert math.isnan(Max(first).merged(Max(second)).value)
        assert math.isnan(Min(first).merged(Min(second)).value)


def test_the_same_name_measured_in_two_ways_is_an_error():
    with pytest.raises(TypeError, match=r"'a'.*Sum and Mean"):
        merge([{"a": Sum(1)}, {"a": Mean(1)}])


def test_measurements_survive_the_way_to_another_process():
    assert to_plain({"loss": Mean(6.0, 3)}) == {"loss": ["mean", 6.0, 3]}
    assert from_plain(to_plain(PARTS[1])) == PARTS[1]
    for bad in (["median", 1], ["mean"], [], ["sum", "x"], 5, ["sum", 1, 2]):
        with pytest.raises(ValueError, match="no measurement"):
            from_plain({"a": bad})
