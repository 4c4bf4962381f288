from fractions import Fraction

import pytest

from dovetail.rewards.answer import (
    as_number,
    compare,
    extract_answer,
    is_hostile,
    label_answer,
    last_boxed,
)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{1} no, \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\fbox{7}", "7"),
        ("\\boxed 5 apples", "5"),
        ("Answer: 12 apples", "12 apples"),
        ("The answer is 3.\nThe final answer: **17**", "17"),
        ("12+34=046", "046"),
        ("1 then 2 then 3,", "3"),
        ("x = -4", "-4"),
        ("10-4", "4"),
        ("costs 1,234.50 in all", "1,234.50"),
        ("half is 1/2 of it", "1/2"),
        ("about .5", ".5"),
        ("no idea", None),
        ("", None),
        ("\\boxed{unclosed 9", "9"),
    ],
)
def test_the_final_answer_is_the_last_box_then_the_answer_line_then_the_last_number(
    response, answer
):
    assert extract_answer(response) == answer


def test_only_the_end_of_an_endless_response_is_searched():
    assert extract_answer("\\boxed{1}" + " x" * 60_000) is None
    assert extract_answer("x " * 600_000 + "\\boxed{1}") == "1"


def test_a_box_is_closed_by_its_own_brace():
    assert last_boxed("\\boxed{a{b}{c}} d}") == "a{b}{c}"
    assert last_boxed("\\boxed{a{b}") is None
    assert last_boxed("nothing") is None


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        (46, "46"),
        (0.5, "0.5"),
        (" 46 ", "46"),
        ("so \\boxed{46}", "46"),
        ("3 + 4 = 7\n#### 7", "7"),
    ],
)
def test_labels_are_numbers_text_boxed_or_gsm8k(label, answer):
    assert label_answer(label) == answer


@pytest.mark.parametrize("label", ["", "####", None, [1], True])
def test_a_label_without_an_answer_is_refused(label):
    with pytest.raises(ValueError, match="a label for math"):
        label_answer(label)


@pytest.mark.parametrize(
    ("answer", "label", "verdict"),
    [
        ("046", "46", True),
        ("46", "47", False),
        ("-3", "\u22123", True),
        ("+3.50", "3.5", True),
        ("1,234", "1234", True),
        ("$12$", "12", True),
        ("12.", "12", True),
        ("\\dfrac{1}{2}", "0.5", True),
        ("-\\frac{2}{4}", "-1/2", True),
        ("0.333333", "1/3", True),
        ("0.33", "1/3", False),
        ("123456789012345678901234567890", "123456789012345678901234567891", False),
        ("1/0", "1/0", True),
        ("\\text{Paris}", "Paris", True),
        ("\\left( 1, 2 \\right)", "(1,2)", None),
        ("a house", "5", False),
        ("\\pi", "3.14159", None),
        ("x+1", "1+x", None),
        ("", "5", False),
    ],
)
def test_text_and_numbers_are_compared_without_algebra(answer, label, verdict):
    assert compare(answer, label) is verdict


def test_numbers_are_exact_and_bounded():
    assert as_number("\\frac{-6}{4}") == Fraction(-3, 2)
    assert as_number("9" * 201) is None
    assert as_number("1e99") is None
    assert as_number("1/0") is None


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}",
        "9**9**9**9",
        "2^{99999999}",
        "1e99999",
        "99999!",
        "((3!)!)!",
        "(" * 3000 + "1" + ")" * 3000,
        "+".join(["1"] * 9000),
    ],
)
def test_what_is_meant_to_hang_is_known_by_its_looks(answer):
    assert is_hostile(answer, "5")


@pytest.mark.parametrize(
    "answer", ["x^2y^2z^2", "e^{x^2}", "5!", "2^{100}", "\\frac{(a+b)^2}{c^{2n}}"]
)
def test_honest_answers_are_not_hostile(answer):
    assert not is_hostile(answer, "5")


def test_an_answer_may_look_like_its_label():
    assert not is_hostile("2^{20250}", "4^{10125}")
