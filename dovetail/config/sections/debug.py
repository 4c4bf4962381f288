"""Run one side without the other."""

from __future__ import annotations

from pydantic import Field

from dovetail.config.sections.base import Section


class DebugConfig(Section):
    """Run one side without the other."""

    debug_rollout_only: bool = Field(False, description="Collect and score samples, never train.")
    debug_train_only: bool = Field(
        False, description="Train on saved samples, never generate; needs load_debug_rollout_data."
    )
    save_debug_rollout_data: str | None = Field(
        None, description="Write each step's samples here; {rollout_id} in the path is the step."
    )
    load_debug_rollout_data: str | None = Field(
        None,
        description=(
            "Train on samples saved by save_debug_rollout_data; implies debug_train_only."
        ),
    )
