"""The rule of DeepScaleR for models that think first: only what follows the thoughts counts.

Source: M. Luo et al., "DeepScaleR: Surpassing O1-Preview with a 1.5B Model by Scaling RL", 2025
(pretty-radio-b75.notion.site).
"""

from __future__ import annotations

from typing import Any

from dovetail.rewards.answer import last_boxed
from dovetail.rewards.grade import grade_boxed
from dovetail.rewards.math import MathReward
from dovetail.types.sample import Sample


def solution_of(response: str) -> str | None:
    """The text after the last </think>, else that between the first two ###Response; None without
    either mark.
    """
    if "</think>" in response:
        return response.rpartition("</think>")[2]
    parts = response.split("###Response")
    return parts[1] if len(parts) > 1 else None


def get_deepscaler_rule_based_reward(response: str, label: Any) -> int:
    """1 if the solution's \\boxed{} answer is the label (text or number), else 0.

    Waits for the comparison; `DeepscalerReward` does not.
    """
    solution = solution_of(response)
    return int(solution is not None and label != "" and grade_boxed(solution, label))


class DeepscalerReward(MathReward):
    """1.0 if the solution's \\boxed{} answer is the label, else 0.0."""

    async def __call__(self, sample: Sample, response: str) -> float:
        """The reward of a response.

        Raises:
            DataError: the sample has no label.
            ValueError: the label is no answer.
        """
        solution = solution_of(response)
        answer = None if solution is None else last_boxed(solution)
        # A response without an answer still has its label looked at: a wrong dataset shows at once.
        return await super().__call__(sample, "" if answer is None else f"\\boxed{{{answer}}}")
