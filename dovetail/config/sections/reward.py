"""What a response is worth."""

from __future__ import annotations

from pydantic import Field

from dovetail.config.sections.base import Section


class RewardConfig(Section):
    """What a response is worth."""

    rm_type: str | None = Field(
        None, description="Built-in reward by name; a sample's metadata['rm_type'] wins."
    )
    rm_url: str | None = Field(None, description="Address that remote_rm posts to.")
    reward_key: str | None = Field(None, description="Entry of a dict reward that is trained on.")
    eval_reward_key: str | None = Field(
        None, description="Entry of a dict reward that evaluation reports; default: reward_key."
    )
    group_rm: bool = Field(False, description="Call the reward once with a whole group.")
    reward_timeout_s: float = Field(
        30.0, gt=0, description="Seconds after which a reward counts as failed."
    )
    reward_workers: int = Field(2, ge=1, description="Worker processes for rewards that can hang.")
    max_reward_failures: int = Field(
        64, ge=1, description="Failed rewards in a row that stop the run."
    )
