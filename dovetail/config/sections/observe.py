"""What a person can see."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.config.sections.base import Section


class ObserveConfig(Section):
    """What a person can see."""

    run_name: str = Field(
        "run",
        min_length=1,
        pattern=r"^[\w.\-]+$",
        description="Name of the run; part of the default run directory.",
    )
    run_dir: str | None = Field(
        None,
        description=(
            "Run directory; default: the first free outputs/<run_name>[-n], and with --load that "
            "of the run that is resumed."
        ),
    )
    save_samples: bool = Field(
        True, description="Write the samples of every step to the run directory."
    )
    trace: bool = Field(
        False,
        description=(
            "Write a trace of every step (phases, samples, spans of hooks) to the run directory, "
            "for ui.perfetto.dev."
        ),
    )
    progress: Literal["auto", "rich", "plain", "off"] = Field(
        "auto", description="Progress bars on a terminal, plain lines otherwise."
    )
    log_passrate: bool = Field(
        True, description="Log pass@k of evaluation sets with several samples per prompt."
    )
    use_tensorboard: bool = Field(
        True, description="Write TensorBoard events to the run directory."
    )
    use_wandb: bool = Field(False, description="Log to Weights & Biases (extra: wandb).")
    wandb_project: str = Field("dovetail", description="Weights & Biases project.")
    wandb_group: str | None = Field(None, description="Weights & Biases group; default: run_name.")
    wandb_mode: Literal["online", "offline", "disabled"] = Field(
        "online", description="Weights & Biases mode."
    )
    trackers: list[str] = Field(
        default_factory=list,
        description="More trackers by name, from entry points of the group dovetail.trackers.",
    )
