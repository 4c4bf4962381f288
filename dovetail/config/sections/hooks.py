"""The user's functions: registered name, pkg.mod.attr, pkg.mod:attr or path/file.py:attr."""

from __future__ import annotations

from pydantic import Field

from dovetail.config.sections.base import Section


class HooksConfig(Section):
    """The user's functions: registered name, pkg.mod.attr, pkg.mod:attr or path/file.py:attr."""

    rollout_function_path: str | None = Field(
        None, description="Hook: collects all samples of a step."
    )
    eval_function_path: str | None = Field(
        None, description="Hook: evaluation instead of the built-in one."
    )
    custom_generate_function_path: str | None = Field(
        None, description="Hook: makes the response of one sample."
    )
    custom_rm_path: str | None = Field(None, description="Hook: reward.")
    dynamic_sampling_filter_path: str | None = Field(
        None, description="Hook: keep or drop a finished group."
    )
    buffer_filter_path: str | None = Field(
        None, description="Hook: choose groups out of the buffer."
    )
    custom_reward_post_process_path: str | None = Field(
        None, description="Hook: rewards before advantages."
    )
