"""Rules of the slime family: dapo, deepscaler, f1, gpqa; and grading by plain functions."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from dovetail.config.sections import RewardConfig
from dovetail.rewards.dapo import compute_score, is_correct_minerva, normalize_final_answer
from dovetail.rewards.deepscaler import DeepscalerReward, get_deepscaler_rule_based_reward
from dovetail.rewards.f1 import f1_score
from dovetail.rewards.gpqa import compute_gpqa_reward
from dovetail.rewards.grade import grade_boxed, is_same_answer, is_same_text
from dovetail.rewards.score import Scorer
from dovetail.rewards.table import TABLE, build_reward
from dovetail.types.sample import Sample


@pytest.mark.parametrize(
    ("response", "label", "score", "pred"),
    [
        ("so\nAnswer: 42", "42", 1.0, "42"),
        ("Answer: 1\nno, Answer: 42", "42", 1.0, "42"),
        ("ANSWER:  $1,234$ dollars", "1234", 1.0, "1234"),
        ("Answer: x = \\frac12", "\\frac{1}{2}", 1.0, "\\frac{1}{2}"),
        ("Answer: \\text{(B)}", "(B)", 1.0, "(B)"),
        ("Answer: 41", "42", -1.0, "41"),
        ("it is 42", "42", -1.0, "[INVALID]"),
        ("Answer: 42\n" + "." * 300, "42", -1.0, "[INVALID]"),
    ],
)
def test_dapo_compares_the_last_answer_line_of_the_last_300_characters(
    response: str, label: str, score: float, pred: str
) -> None:
    assert compute_score(response, label) == {"score": score, "acc": score > 0, "pred": pred}


def test_dapo_with_strict_boxes_takes_the_label_to_the_letter() -> None:
    right = compute_score("so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", strict_box_verify=True)
    assert right == {"score": 1.0, "acc": True, "pred": "\\frac{1}{2}"}
    other = compute_score("so \\boxed{1/2}", "\\frac{1}{2}", strict_box_verify=True)
    assert other == {"score": -1.0, "acc": False, "pred": "1/2"}
    assert compute_score("Answer: 3", "3", strict_box_verify=True)["pred"] is None
    with pytest.raises(ValueError, match="expected 4"):
        compute_score("\\boxed{1}", "1", True, [1, 2])


def test_minerva_takes_a_label_out_of_its_box_when_told() -> None:
    assert is_correct_minerva("Answer: 7", "so \\boxed{7}", gt_need_extract=True) == (True, "7")
    assert normalize_final_answer("the area is $12\\text{ cm}^2$") == "12"


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        ("I think </think> \\boxed{4}", "4", 1),
        ("I think </think> \\boxed{4}", 4, 1),
        ("</think> no \\boxed{1} </think> \\boxed{4}", "4", 1),
        ("</think> \\boxed{0.5}", "so \\boxed{\\frac{1}{2}}", 1),
        ("###Response \\boxed{4}", "4", 1),
        ("</think> \\boxed{5}", "4", 0),
        ("</think> it is 4", "4", 0),
        ("\\boxed{4}", "4", 0),
        ("</think> \\boxed{4}", "", 0),
    ],
)
def test_deepscaler_looks_only_behind_the_thoughts(response: str, label: Any, reward: int) -> None:
    assert get_deepscaler_rule_based_reward(response, label) == reward


def test_f1_counts_words_in_common() -> None:
    # 2 words in common of 3 and of 4 (articles out): precision 2/3, recall 1/2, F1 4/7.
    f1, precision, recall = f1_score("The cat, sat down!", "a cat sat on mats")
    assert (f1, precision, recall) == pytest.approx((4 / 7, 2 / 3, 1 / 2))
    assert f1_score("yes", "yes") == (1.0, 1.0, 1.0)
    assert f1_score("yes indeed", "yes") == (0.0, 0.0, 0.0)
    assert f1_score("dog", "cat") == f1_score(None, "cat") == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("response", "label", "metadata", "reward"),
    [
        ("The answer is C.", "C", {}, 1.0),
        ("A or B? The correct answer is (B)", "B", None, 1.0),
        ("Answer: **D**", "D", {}, 1.0),
        ("A is wrong, so B", "B", {}, 1.0),
        ("thus \\boxed{\\text{C}}", "c", {}, 1.0),
        ("the answer is F", "F", {"choices": list("uvwxyz")}, 1.0),
        ("the answer is B", 1, {"choices": ["one", "two"]}, 1.0),
        ("the answer is B", "two", {"choices": ["one", "two"]}, 1.0),
        ("the answer is B", "two", {"choices": {"B": "two", "C": "three"}}, 1.0),
        ("it is\nTwo.", "B", {"choices": ["one", "two"]}, 1.0),
        ("the answer is A", "B", {"correct_letter": "A"}, 1.0),
        ("B </think> the answer is A", "B", {}, 0.0),
        ("the answer is a cat", "A", {}, 1.0),
        ("the answer is about cats", "A", {}, 0.0),
        ("no idea", "A", {}, 0.0),
        ("", "A", {}, 0.0),
        (None, "A", {}, 0.0),
    ],
)
def test_gpqa_takes_the_letter_that_a_response_settles_on(
    response: str | None, label: Any, metadata: dict | None, reward: float
) -> None:
    assert compute_gpqa_reward(response, label, metadata) == reward


def test_algebra_is_graded_by_a_plain_function_from_any_thread() -> None:
    assert is_same_answer("x^2+2x+1", "(x+1)^2") and not is_same_text("x^2+2x+1", "(x+1)^2")
    assert not is_same_answer("x^2+1", "(x+1)^2")
    assert grade_boxed("so \\boxed{\\sqrt{8}}", "2\\sqrt{2}")

    async def other_thread() -> bool:
        return await asyncio.to_thread(is_same_answer, "2x", "x+x")

    assert asyncio.run(other_thread())


def test_an_answer_that_hangs_the_algebra_is_wrong_in_bounded_time() -> None:
    started = time.monotonic()
    assert not is_same_answer(
        "\\int_0^1 " + "\\sin(" * 9 + "x^x" + ")" * 9 + "dx", "1", timeout_s=1
    )
    assert time.monotonic() - started < 10
    assert is_same_answer("2x", "x+x")


@pytest.mark.parametrize("name", ["deepscaler", "dapo", "f1", "gpqa"])
def test_a_rule_is_a_row_of_the_table_and_asks_for_a_label(name: str) -> None:
    async def score(label: str | None) -> Sample:
        sample = Sample(index=0, response="</think> Answer: B \\boxed{B}", label=label)
        scorer = Scorer(RewardConfig(rm_type=name, reward_key="score"))
        try:
            await scorer.score(sample)
        finally:
            scorer.close()
        return sample

    assert asyncio.run(score("B")).reward["score"] > 0.3
    with pytest.raises(ValueError, match=f"the reward {name if name != 'deepscaler' else 'math'}"):
        asyncio.run(score(None))


def test_every_row_is_built_by_its_path() -> None:
    reward = RewardConfig(rm_url="http://127.0.0.1:1/")
    for row in TABLE:
        build_reward(row, reward, 0).close()


def test_deepscaler_in_a_run_compares_as_math_does() -> None:
    async def score(response: str) -> float:
        rule = DeepscalerReward(workers=1, timeout_s=5.0)
        try:
            return await rule(Sample(label="2\\sqrt{2}"), response)
        finally:
            rule.close()

    assert asyncio.run(score("</think> \\boxed{\\sqrt{8}}")) == 1.0
    assert asyncio.run(score("\\boxed{\\sqrt{8}}")) == 0.0
