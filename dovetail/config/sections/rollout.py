"""How samples are collected for one step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.config.sections.base import Section


class RolloutConfig(Section):
    """How samples are collected for one step."""

    rollout_batch_size: int = Field(8, ge=1, description="Groups (prompts) per step.")
    n_samples_per_prompt: int = Field(
        1, ge=1, description="Samples per prompt: the size of a group."
    )
    over_sampling_batch_size: int | None = Field(
        None,
        ge=1,
        description=(
            "Groups submitted at a time when a filter drops some; default: rollout_batch_size."
        ),
    )
    max_lag: int = Field(
        0,
        ge=0,
        description=(
            "Publishes that a sample's oldest token may lie behind the weights it trains; above 0 "
            "generation goes on during training."
        ),
    )
    update_weights_interval: int = Field(
        1, ge=1, description="Steps from one publish to the engines to the next."
    )
    async_max_concurrent_samples: int | None = Field(
        None,
        ge=1,
        description="Samples that are made at once when max_lag is above 0; default: all that the "
        "steps ahead need.",
    )
    async_data_buffer_capacity_factor: float | None = Field(
        2.0,
        ge=1,
        description="When max_lag is above 0, steps at most whose groups are made or wait for "
        "training (whole steps): fewer means fresher samples.",
    )
    async_unused_samples_handler: Literal["retry", "drop", "keep"] = Field(
        "retry",
        description="Groups that max_lag is too small for: have their prompts answered again, drop "
        "them, or train them all the same (then only the correction sees to it).",
    )
    partial_rollout: bool = Field(
        False,
        description=(
            "Keep unfinished samples of surplus groups in the buffer and finish them in"
            " a later step."
        ),
    )
    mask_offpolicy_in_partial_rollout: bool = Field(
        False, description="Do not train on the part of a resumed sample that older weights made."
    )
    rollout_max_response_len: int = Field(256, ge=1, description="Most tokens of a response.")
    rollout_max_context_len: int | None = Field(
        None,
        ge=2,
        description="Most tokens of prompt plus response; default: what the model allows.",
    )
    rollout_temperature: float = Field(
        1.0, gt=0, description="Sampling temperature; logprobs are taken under it."
    )
    rollout_top_p: float = Field(
        1.0, gt=0, le=1, description="Keep the most probable tokens that hold this mass."
    )
    rollout_top_k: int = Field(
        -1, ge=-1, description="Keep this many most probable tokens; -1 keeps all."
    )
    rollout_min_p: float = Field(
        0.0, ge=0, le=1, description="Drop tokens below this fraction of the most probable one."
    )
    rollout_min_new_tokens: int = Field(
        0, ge=0, description="No stop before this many response tokens."
    )
    rollout_stop: list[str] = Field(
        default_factory=list, description="Strings that end a response."
    )
    rollout_stop_token_ids: list[int] = Field(
        default_factory=list, description="Token ids that end a response, beside the model's own."
    )
    rollout_skip_special_tokens: bool = Field(
        False, description="Leave special tokens out of the response text."
    )
    max_dropped_groups: int = Field(
        1000, ge=1, description="A step that drops this many groups in a row stops the run."
    )
    max_failed_groups: int = Field(
        16,
        ge=1,
        description="Groups in a row whose generate function raised that stop the run.",
    )
    abort_grace_s: float = Field(
        10.0, ge=0, description="Seconds to wait for judges and tools of aborted groups."
    )
    generate_max_turns: int = Field(
        16, ge=1, description="Turns of the model in multi-turn generation with tools."
    )
    generate_tool_call_parser: str = Field(
        "qwen25", description="How the model writes tool calls: qwen25 (hermes) or llama3."
    )
