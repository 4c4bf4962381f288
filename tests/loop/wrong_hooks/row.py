"""One wrong hook: its file, its flag, and what must be said of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from dovetail.hooks import spec_of


@dataclass(frozen=True)
class Wrong:
    """One wrong hook: its slot, its file, and words of the verdict."""

    name: str
    slot: str
    code: str
    says: tuple[str, ...]
    flags: tuple[str, ...] = ()
    attribute: str = "hook"

    def write(self, folder: Path) -> str:
        """The hook's file; the path to name it by."""
        file = folder / "wrong.py"
        file.write_text(dedent(self.code).lstrip("\n"), encoding="utf-8")
        return f"{file}:{self.attribute}"

    @property
    def flag(self) -> str:
        return spec_of(self.slot).flag
