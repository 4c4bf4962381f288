"""`dovetail eval`."""

from __future__ import annotations

import sys

from dovetail.cli.settings import asks_for_help, read_settings, settings_help
from dovetail.config.check import check_evaluation
from dovetail.run.validate import validate_names

_DOC = """\
Evaluate a model on the sets of --eval-prompt-data (NAME PATH ...) or [eval.eval_sets.NAME],
once, without training: the model of --hf-checkpoint, or the checkpoint of --load."""


def evaluate(argv: list[str]) -> int:
    """Resolve and check first, load torch afterwards."""
    if asks_for_help(argv):
        sys.stdout.write(settings_help("eval", _DOC))
        return 0
    resolved = read_settings(argv)
    check_evaluation(resolved.config)
    validate_names(resolved.config)
    for note in resolved.notes:
        sys.stderr.write(f"note: {note}\n")
    from dovetail.run.evaluate import run_eval

    return run_eval(resolved).exit_code
