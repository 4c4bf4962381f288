"""Processes of a run that lives on Ray, as /proc shows them."""

from __future__ import annotations

import os
from pathlib import Path

from dovetail.engines.process import processes_below


def processes_of(pid: int) -> list[str]:
    """What runs below a process, as `pid: command`; the helpers of Python's own left out."""
    found = []
    for child in processes_below(pid):
        words = command(child)
        if words and "resource_tracker" not in words:
            found.append(f"{child}: {words[:100]}")
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def holding(run_dir: Path) -> dict[str, int]:
    """The process that writes each log of the run's actors, by the log's name without ending."""
    found = {}
    for one in Path("/proc").iterdir():
        if not one.name.isdigit():
            continue
        try:
            target = os.readlink(one / "fd" / "1")
        except OSError:
            continue
        path = Path(target)
        if path.parent == run_dir / "logs" and "ray::" in command(int(one.name)):
            found[path.stem] = int(one.name)
    return found
