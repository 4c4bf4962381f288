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
            "Resume from this checkpoint, or from the newest good one of this run directory or "
            "directory of checkpoints. The run's own may still be empty: it then starts from the "
            "beginning."
        ),
    )
    save_interval: int | None = Field(
        None, ge=1, description="Steps between checkpoints; the last step is always saved when set."
    )
    async_save: bool = Field(
        False, description="Write checkpoints of trainer ranks while the run goes on."
    )
    save_keep: int = Field(2, ge=1, description="Newest checkpoints kept.")
    save_hf: str | None = Field(
        None,
        description=(
            "Export the policy as a Hugging Face directory at the end; {rollout_id} in "
            "it exports at every save."
        ),
    )
