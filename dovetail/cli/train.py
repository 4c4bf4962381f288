"""`dovetail train`."""

from __future__ import annotations

import sys

from dovetail.cli.settings import (
    asks_for_help,
    read_settings,
    settings_help,
    show_plan,
    tell_notes,
)
from dovetail.run.validate import validate, validate_cluster, validate_launch

_DOC = """\
Train a model: roll out, score, train, publish, once per step. Everything it leaves is in one
run directory (--run-dir). Ctrl-C or SIGTERM saves and leaves; --load goes on from there.
--dry-run checks the settings and shows who gets which devices and how much memory each is expected
to need; it loads no weights and starts nothing."""
_DRY_RUN = "--dry-run"


def train(argv: list[str]) -> int:
    """Resolve and check first, load torch afterwards."""
    if asks_for_help(argv):
        sys.stdout.write(settings_help("train", _DOC))
        return 0
    resolved = read_settings([token for token in argv if token != _DRY_RUN])
    validate(resolved.config)
    validate_cluster(resolved.config)
    tell_notes(resolved, validate_launch(resolved.config, resolved.passthrough))
    if _DRY_RUN in argv:
        return show_plan(resolved.config, "ok: these settings can work together\n")
    from dovetail.run.train import run_training

    return run_training(resolved).exit_code
