"""`rollout.rm_hub.math_dapo_utils`: DAPO's score and its parts."""

from __future__ import annotations

from dovetail.compat.modules.rm_hub.math_utils import last_boxed_only_string, remove_boxed
from dovetail.rewards.dapo import (
    compute_score,
    is_correct_minerva,
    is_correct_strict_box,
    normalize_final_answer,
)

__all__ = [
    "compute_score",
    "is_correct_minerva",
    "is_correct_strict_box",
    "last_boxed_only_string",
    "normalize_final_answer",
    "remove_boxed",
    "verify",
]


def verify(
    solution_str: str,
    answer: str,
    strict_box_verify: bool = False,
    pause_tokens_index: list[int] | None = None,
) -> tuple[bool, str | None]:
    """Whether a response is right, and the answer found in it."""
    if strict_box_verify:
        sign, pred = is_correct_strict_box(solution_str, answer, pause_tokens_index)
        return sign == 1, pred
    return is_correct_minerva(solution_str, answer)
