"""What is kept, and how a run goes on."""

from __future__ import annotations

from pydantic import Field

from dovetail.config.sections.base import Section


class CheckpointConfig(Section):
    """What is kept, and how a run goes on."""

    save: str | None = Field(
        None, description="Directory of checkpoints; default: checkpoints in the run directory."
    )
    load: str | None = Field(
        None,
        description=(
            "Resume from this checkpoint, or the newest good one in this directory. The run's own "
            "directory of checkpoints may still be empty: the run then starts from the beginning."
        ),
    )
    save_interval: int | None = Field(
        None, ge=1, description="Steps between checkpoints; the last step is always saved when set."
    )
    save_keep: int = Field(2, ge=1, description="Newest checkpoints kept.")
    save_hf: str | None = Field(
        None,
        description=(
            "Export the policy as a Hugging Face directory at the end; {rollout_id} in "
            "it exports at every save."
        ),
    )
