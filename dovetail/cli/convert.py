"""`dovetail convert`."""

from __future__ import annotations

import sys
from pathlib import Path

from dovetail.cli.settings import asks_for_help
from dovetail.types.errors import UsageError

_HELP = """usage: dovetail convert CHECKPOINT DIRECTORY

Export the policy of a checkpoint as a Hugging Face directory that transformers loads.

  CHECKPOINT   one checkpoint, or a directory of them: the newest good one is taken
  DIRECTORY    where to write; must not exist yet, or be empty
"""


def convert(argv: list[str]) -> int:
    """Check both paths, then export."""
    if asks_for_help(argv):
        sys.stdout.write(_HELP)
        return 0
    if len(argv) != 2:
        raise UsageError(
            f"convert got {len(argv)} arguments, expected 2: dovetail convert CHECKPOINT DIRECTORY"
        )
    source, target = Path(argv[0]), Path(argv[1])
    if not source.exists():
        raise UsageError(f"checkpoint {source} does not exist (looked from {Path.cwd()})")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UsageError(f"{target} is there already and not empty; name a new directory")
    from dovetail.run.export import export_checkpoint

    export_checkpoint(source, target)
    sys.stdout.write(f"wrote {target}\n")
    return 0
