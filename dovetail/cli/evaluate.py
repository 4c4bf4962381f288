"""`dovetail eval`."""

from __future__ import annotations

import sys
from pathlib import Path

from dovetail.cli.settings import asks_for_help, read_settings, settings_help
from dovetail.config.check import check_evaluation
from dovetail.config.engine_rules import engine_notes
from dovetail.config.flags import split_files
from dovetail.config.notes import evaluation_notes
from dovetail.observe.run_dir import RunDir
from dovetail.run.validate import validate_names
from dovetail.types.errors import UsageError

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
_OWN = ["--no-run-dir", "--no-load"]
"""Of a run's configuration these are about the run itself."""


def evaluate(argv: list[str]) -> int:
    """Resolve and check first, load torch afterwards."""
    if asks_for_help(argv):
        sys.stdout.write(settings_help("eval", _DOC, "[MODEL_DIR | RUN_DIR | CHECKPOINT] "))
        return 0
    resolved = read_settings(_with_model(argv))
    check_evaluation(resolved.config)
    validate_names(resolved.config)
    config = resolved.config
    for note in [*resolved.notes, *evaluation_notes(config), *engine_notes(config)]:
        sys.stderr.write(f"note: {note}\n")
    from dovetail.observe.eval_table import eval_table
    from dovetail.run.evaluate import run_eval

    report = run_eval(resolved)
    if report.exit_code == 0 and report.metrics:
        sys.stdout.write(f"\n{eval_table(report.metrics)}\n")
    return report.exit_code


def _with_model(argv: list[str]) -> list[str]:
    """The arguments with directories turned into the run files and flags that they stand for; flags
    that were given go last and win."""
    names, flags = split_files(argv)
    files: list[str] = []
    ahead: list[str] = []
    for name in names:
        if not Path(name).is_dir():
            if not Path(name).suffix and not Path(name).exists():
                raise UsageError(
                    f"'{name}' does not exist (looked from {Path.cwd()}); expected a model "
                    "directory, a run directory, a checkpoint of a run, or a TOML run file"
                )
            files.append(name)
            continue
        own_files, own_flags = _meaning(Path(name))
        files += own_files
        ahead += own_flags
    return [*files, *ahead, *flags]


def _meaning(path: Path) -> tuple[list[str], list[str]]:
    """Run files and flags that a directory stands for.

    Raises:
        UsageError: it is no model, no run and no checkpoint of a run.
    """
    run = RunDir.around(path)
    if run is not None and run.path == path:
        own = [str(run.config)]
        saved = run.checkpoints
        if not saved.is_dir() or not any(saved.iterdir()):
            raise UsageError(
                f"the run {path} has no checkpoint in {saved}; name a model directory, or the "
                "checkpoint with --load DIR (TOML: checkpoint.load)"
            )
        return own, [*_OWN, "--load", str(saved)]
    if (path / "config.json").is_file():
        return [], ["--hf-checkpoint", str(path)]
    if run is not None:
        return [str(run.config)], [*_OWN, "--load", str(path)]
    raise UsageError(
        f"{path} is neither a model directory (config.json), nor a run's directory (config.toml), "
        "nor a checkpoint in one; expected one of them, e.g. dovetail eval MODEL_DIR"
    )
