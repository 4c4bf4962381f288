"""`utils.wandb_utils`: a plugin's own metrics at Weights & Biases, in the run's own entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dovetail.types import MissingExtraError

__all__ = ["init_wandb_primary", "init_wandb_secondary", "log_metrics"]


def init_wandb_primary(args: Any) -> None:
    """Start an entry if `args.use_wandb`, and none is open: a run has opened its own."""
    if not getattr(args, "use_wandb", False):
        args.wandb_run_id = None
        return
    wandb = _wandb()
    if wandb.run is None:
        names = ("project", "group", "mode", "dir")
        given = {name: getattr(args, f"wandb_{name}", None) for name in names}
        wandb.init(**{name: value for name, value in given.items() if value is not None})
    args.wandb_run_id = wandb.run.id


def init_wandb_secondary(args: Any, *others: Any) -> None:
    """Join the entry that `args.wandb_run_id` names, in another process than the run's."""
    name = getattr(args, "wandb_run_id", None)
    if name is not None and _wandb().run is None:
        project = getattr(args, "wandb_project", None)
        _wandb().init(id=name, project=project, resume="allow")


def log_metrics(args: Any, metrics: Mapping[str, float], step: int | None) -> None:
    """Log to the open entry, opening one if there is none. Steps of its own would be refused where
    the run has logged later ones, so the step is a number among the others."""
    init_wandb_primary(args)
    _wandb().log({**metrics, "plugin/step": step})


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError(
            "Weights & Biases is not installed: pip install 'dovetail-rl[wandb]'"
        ) from error
    return wandb
