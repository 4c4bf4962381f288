"""`utils.logging_utils`: log lines, and metrics of a plugin's own beside those of the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dovetail.compat.modules.metrics import numbers_of
from dovetail.compat.modules.tensorboard import _TensorboardAdapter

_log = logging.getLogger("dovetail.plugin")

__all__ = [
    "configure_logger",
    "configure_logger_raw",
    "finish_tracking",
    "init_tracking",
    "log",
    "log_checkpoint",
    "log_samples",
]


def configure_logger(prefix: str = "", *args: Any, **kwargs: Any) -> None:
    """Show log lines from INFO on, where the process shows none: a run has set that up itself."""
    if not logging.getLogger().handlers:
        layout = f"%(asctime)s{prefix} %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(level=logging.INFO, format=layout)


configure_logger_raw = configure_logger


def init_tracking(args: Any, primary: bool = True, **kwargs: Any) -> None:
    """Nothing to do: the trackers of `log` start when they are first used."""


def log(args: Any, metrics: Mapping[str, Any], step_key: str) -> None:
    """Log `metrics` at the step that `metrics[step_key]` says: as a line, and to the trackers that
    `args` turns on (use_tensorboard, use_wandb)."""
    values, step = numbers_of(metrics), metrics.get(step_key)
    _log.info("%s %s: %s", step_key, step, values)
    if getattr(args, "use_tensorboard", False):
        _TensorboardAdapter(args).log(values, step=step)
    if getattr(args, "use_wandb", False):
        from dovetail.compat.modules.wandb import log_metrics

        log_metrics(args, values, step)


def log_samples(samples: list[Any], step: int | None = None) -> None:
    """Say how many samples there are; the samples of every step are in the run's dump."""
    _log.info("step %s: %d samples", step, len(samples))


def log_checkpoint(checkpoint_dir: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Say where a checkpoint is."""
    _log.info("checkpoint %s %s", checkpoint_dir, dict(metadata or {}))


def finish_tracking() -> None:
    """Write out what the trackers still hold."""
    _TensorboardAdapter.finish_all()
