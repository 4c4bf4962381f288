"""What stands before the flags of eval and serve: a model, a run, or a checkpoint of one."""

from __future__ import annotations

from pathlib import Path

from dovetail.config.flags import split_files
from dovetail.observe.run_dir import RunDir
from dovetail.types.errors import UsageError

_OWN = ["--no-run-dir", "--no-load"]
"""Of a run's configuration these are about the run itself."""


def with_model(argv: list[str], command: str) -> list[str]:
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
        own_files, own_flags = _meaning(Path(name), command)
        files += own_files
        ahead += own_flags
    return [*files, *ahead, *flags]


def _meaning(path: Path, command: str) -> tuple[list[str], list[str]]:
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
        f"nor a checkpoint in one; expected one of them, e.g. dovetail {command} MODEL_DIR"
    )
