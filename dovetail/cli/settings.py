"""What train, eval and config have in common: run files and flags in, a checked configuration
out."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dovetail.config.flags import split_files
from dovetail.config.notes import notes
from dovetail.config.resolve import Resolved, resolve
from dovetail.config.run import RunConfig

HELP_FLAGS = ("-h", "--help")


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether the arguments ask what they may be."""
    return any(token in HELP_FLAGS for token in argv)


def read_settings(argv: Sequence[str]) -> Resolved:
    """Resolve `[RUN.toml ...] [--flag ...]`; a run directory stands for its config.toml.

    Raises:
        ConfigError: see `dovetail.config.resolve.resolve`.
    """
    files, flags = split_files(argv)
    return resolve([_run_file(Path(name)) for name in files], flags, _own_flags)


def _own_flags(paths: dict[str, str], foreign: bool) -> argparse.ArgumentParser | None:
    # Only a command line with flags that nobody knows needs the user's modules this early.
    from dovetail.hooks.own_flags import own_flags

    return own_flags(paths, foreign)


def _run_file(path: Path) -> Path:
    return path / "config.toml" if path.is_dir() else path


def tell_notes(resolved: Resolved, more: Iterable[str] = ()) -> None:
    """Say once what has no effect in this run, and `more`."""
    for note in [*resolved.notes, *notes(resolved.config), *more]:
        sys.stderr.write(f"note: {note}\n")


def show_plan(config: RunConfig, first: str = "") -> int:
    """Write who gets which devices, and the memory that each is expected to need; `first` before
    it, if the plan can be.

    Raises:
        ConfigError: the plan can't be.
    """
    from dovetail.run.planned import planned

    sys.stdout.write(first + planned(config))
    return 0


def settings_help(
    command: str,
    doc: str,
    first: str = "",
    read: Mapping[str, set[str] | None] | None = None,
) -> str:
    """Help of a command that takes settings.

    Args:
        first: what may stand before them.
        read: those that it reads, see `flag_help`.
    """
    from dovetail.config.reference import flag_help

    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    return f"""usage: dovetail {command} {first}[RUN.toml ...] [--flag ...]

{doc}

A value comes from the default, then from the files from left to right, then from the flags; the
last one wins. Files are TOML with the sections below ([model] hf_checkpoint = "..."). --no-NAME
turns a switch off and unsets a value. Defaults stand in [brackets]. --vllm-NAME and --sglang-NAME
go to the servers of these engines.

{flag_help(width, read)}
"""
