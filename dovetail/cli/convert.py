"""`dovetail convert`."""

from __future__ import annotations

import sys
from pathlib import Path

from dovetail.cli.settings import asks_for_help
from dovetail.types.errors import UsageError

_HELP = """usage: dovetail convert CHECKPOINT DIRECTORY
       dovetail convert --origin MODEL MEGATRON DIRECTORY
       dovetail convert --to-megatron MODEL DIRECTORY

Export the policy of a checkpoint as a Hugging Face directory that transformers loads; or turn
weights in Megatron's form into such a directory and back. One process does it, without a GPU.

  CHECKPOINT   one checkpoint of a run, or a directory of them: the newest good one is taken
  MEGATRON     weights as megatron-core saves them (torch_dist: metadata.json, *.distcp)
  MODEL        a Hugging Face directory; for --origin, of the same architecture
  DIRECTORY    where to write; must not exist yet, or be empty
"""
_ORIGIN, _TO_MEGATRON = "--origin", "--to-megatron"


def convert(argv: list[str]) -> int:
    """Check the paths, then write."""
    if asks_for_help(argv):
        sys.stdout.write(_HELP)
        return 0
    way = argv[0] if argv and argv[0].startswith("--") else None
    if way not in (None, _ORIGIN, _TO_MEGATRON):
        raise UsageError(f"convert does not know {way}; it knows {_ORIGIN} and {_TO_MEGATRON}")
    given = argv if way is None else argv[1:]
    expected = 3 if way == _ORIGIN else 2
    if len(given) != expected:
        told = "" if way is None else f" after {way}"
        raise UsageError(
            f"convert got {len(given)} arguments{told}, expected {expected}: dovetail convert "
            "CHECKPOINT DIRECTORY, --origin MODEL MEGATRON DIRECTORY, or --to-megatron MODEL "
            "DIRECTORY"
        )
    *sources, target = (Path(one) for one in given)
    for source in sources:
        if not source.exists():
            what = "checkpoint" if source == sources[-1] and way != _TO_MEGATRON else "model"
            raise UsageError(f"{what} {source} does not exist (looked from {Path.cwd()})")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UsageError(f"{target} is there already and not empty; name a new directory")
    _write(way, sources, target)
    sys.stdout.write(f"wrote {target}\n")
    return 0


def _write(way: str | None, sources: list[Path], target: Path) -> None:
    from dovetail.run import export

    if way == _ORIGIN:
        export.export_megatron(sources[1], sources[0], target)
    elif way == _TO_MEGATRON:
        export.import_to_megatron(sources[0], target)
    else:
        export.export_checkpoint(sources[0], target)
