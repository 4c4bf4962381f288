"""`rollout.rm_hub.math_utils`: answers out of \\boxed{}, and whether two of them are the same.

Where algebra is needed it runs in a process with a time limit; the caller waits.
"""

from __future__ import annotations

from dovetail.rewards.answer import last_boxed, normalise
from dovetail.rewards.grade import grade_boxed, is_same_answer, is_same_text

__all__ = [
    "extract_answer",
    "extract_boxed_answer",
    "grade_answer_mathd",
    "grade_answer_sympy",
    "grade_answer_verl",
    "last_boxed_only_string",
    "mathd_normalize_answer",
    "remove_boxed",
]


def extract_answer(passage: str) -> str | None:
    """What stands in the last \\boxed{}; None without one."""
    return last_boxed(passage)


extract_boxed_answer = extract_answer


def last_boxed_only_string(string: str) -> str | None:
    """The last \\boxed{...}, with its braces; None without one."""
    inside = last_boxed(string)
    return None if inside is None else f"\\boxed{{{inside}}}"


def remove_boxed(s: str) -> str | None:
    """The inside of a text that is one \\boxed{...}; None for anything else."""
    is_box = s.startswith(("\\boxed", "\\fbox")) and s.endswith("}")
    return last_boxed(s) if is_box else None


def mathd_normalize_answer(answer: str | None) -> str | None:
    """The text without what does not change its meaning."""
    return None if answer is None else normalise(answer)


def grade_answer_mathd(given_answer: str, ground_truth: str) -> bool:
    """Whether both are the same text or number, without algebra."""
    return is_same_text(str(given_answer), str(ground_truth))


def grade_answer_sympy(given_answer: str, ground_truth: str) -> bool:
    """Whether both are the same by algebra; an empty answer is wrong."""
    given, wanted = str(given_answer), str(ground_truth)
    return bool(given.strip() and wanted.strip()) and is_same_answer(given, wanted)


def grade_answer_verl(solution_str: str, ground_truth: str) -> bool:
    """Whether what the response boxes last is the label, or what the label boxes."""
    return bool(ground_truth) and grade_boxed(solution_str, ground_truth)
