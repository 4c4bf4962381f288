"""Whether samples that users' functions made can be trained on."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.types import Group, HookRunError, Sample


def check_samples(groups: Sequence[Group], where: str) -> None:
    """Refuse samples without the ids that training needs; `where` names who made them.

    Raises:
        HookRunError: a sample lacks `tokens` or `response_length`, or they do not fit together.
    """
    for group in groups:
        for sample in group:
            problem = _problem(sample)
            if problem is not None:
                raise HookRunError(
                    f"{where}: sample {sample.index} of group {sample.group_index} {problem}. "
                    "Expected: `tokens` (ids of the prompt, then of the response) and "
                    "`response_length` (how many of them are the response); "
                    "`sample.append_response_tokens` sets both"
                )


def _problem(sample: Sample) -> str | None:
    if not len(sample.tokens):
        return "has no tokens"
    if sample.response and not sample.response_length:
        return f"has the response {sample.response[:40]!r} and response_length 0"
    if not 0 <= sample.response_length < len(sample.tokens):
        return f"has {len(sample.tokens)} tokens and response_length {sample.response_length}"
    return None
