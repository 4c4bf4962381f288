"""`dovetail eval`."""

from __future__ import annotations

import sys

from dovetail.cli.named_model import with_model
from dovetail.cli.settings import asks_for_help, read_settings, settings_help
from dovetail.config.check import check_evaluation
from dovetail.config.engine_rules import engine_notes
from dovetail.config.notes import evaluation_notes
from dovetail.run.validate import validate_launch, validate_names

_DOC = """\
Evaluate a model once, without training, and print each set's mean@n, pass@k and maj@k with 95 %
confidence intervals. The model is the first thing that is named:

  dovetail eval MODEL_DIR --eval-prompt-data NAME PATH --label-key label --rm-type math
  dovetail eval RUN_DIR                   the newest checkpoint of a run, its model and its sets
  dovetail eval RUN_DIR/checkpoints/step_000100 --n-samples-per-eval-prompt 16
  dovetail eval --hf-checkpoint DIR [--load CHECKPOINT] --eval-config sets.yaml

Sets come from --eval-prompt-data (NAME PATH ...), from [eval.eval_sets.NAME] in a run file, or from
--eval-config, a YAML file in the slime family's form. Metrics, every answer and evaluation.json go
to --run-dir (default: the first free outputs/<run_name>-eval[-n])."""


def evaluate(argv: list[str]) -> int:
    """Resolve and check first, load torch afterwards."""
    if asks_for_help(argv):
        sys.stdout.write(settings_help("eval", _DOC, "[MODEL_DIR | RUN_DIR | CHECKPOINT] "))
        return 0
    resolved = read_settings(with_model(argv, "eval"))
    check_evaluation(resolved.config)
    validate_names(resolved.config)
    launch_notes = validate_launch(resolved.config, resolved.passthrough)
    config = resolved.config
    of_engines = [*engine_notes(config), *launch_notes]
    for note in [*resolved.notes, *evaluation_notes(config), *of_engines]:
        sys.stderr.write(f"note: {note}\n")
    from dovetail.observe.eval_table import eval_table
    from dovetail.run.evaluate import run_eval

    report = run_eval(resolved)
    if report.exit_code == 0 and report.metrics:
        sys.stdout.write(f"\n{eval_table(report.metrics)}\n")
    return report.exit_code
