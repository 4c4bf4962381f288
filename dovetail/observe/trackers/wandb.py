"""Metrics to Weights & Biases. A resumed run goes on in the same W&B run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dovetail.types.errors import MissingExtraError

if TYPE_CHECKING:
    from dovetail.observe.tracker import TrackerSetup

_RUN_ID = "run_id.txt"


class WandbTracker:
    """One W&B run per run directory."""

    def __init__(self, setup: TrackerSetup) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError(
                "Weights & Biases is not installed: pip install 'dovetail-rl[wandb]', "
                "or --no-use-wandb (TOML: observe.use_wandb)"
            ) from error
        directory = setup.run_dir.wandb
        directory.mkdir(parents=True, exist_ok=True)
        id_file = directory / _RUN_ID
        self._run = wandb.init(
            project=setup.wandb_project,
            group=setup.wandb_group or setup.run_name,
            name=setup.run_name,
            mode=setup.wandb_mode,
            dir=str(directory),
            config=dict(setup.config),
            id=id_file.read_text().strip() if id_file.is_file() else None,
            resume="allow",
        )
        id_file.write_text(self._run.id + "\n")
        # W&B's own counter never goes back; ours does when a run resumes at an earlier step.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send one row."""
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        """Send what is queued and end the W&B run."""
        self._run.finish()
