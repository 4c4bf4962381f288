"""What one row of the hook table says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

FAMILIES = ("native", "slime", "vime", "miles")
"""`family:path` forces one of them."""


class OnError(StrEnum):
    """What happens when the user's function raises."""

    STOP = "stop"
    """The run ends with the hook's name and the user's line."""
    DROP = "drop"
    """Its group is left out and counted; too many in a row end the run."""
    COUNT = "count"
    """Its sample gives no gradient and is counted; too many in a row end the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """One way in which a function of the slot is called."""

    families: tuple[str, ...]
    positional: tuple[str, ...]
    """Names of the values passed by position, in order."""
    keywords: tuple[str, ...] = ()
    """Values passed by keyword to functions that name them."""
    to_var_keywords: bool = False
    """Functions with `**kwargs` get `keywords` too."""
    construct: tuple[str, ...] | None = None
    """For classes: the values of the constructor; the instance is called."""
    batched: bool = False
    """It takes a whole group where its plain sibling takes one sample."""
    origin: str = ""
    """Where it comes from, when documents and call sites differ."""

    @property
    def signature(self) -> str:
        """For a person: `(args, sample[, evaluation=])`."""
        inside = ", ".join(self.positional)
        optional = "".join(f"[, {name}=]" for name in self.keywords)
        if self.construct is None:
            return f"({inside}{optional})"
        return f"class: __init__({', '.join(self.construct)}), __call__({inside}{optional})"

    @property
    def label(self) -> str:
        """Families, and the origin when there is one."""
        names = ", ".join(self.families)
        return f"{names} ({self.origin})" if self.origin else names


@dataclass(frozen=True, slots=True, kw_only=True)
class HookSpec:
    """One hook. Loading, checks, `--help`, docs, `dovetail hooks` and contract tests read it."""

    slot: str
    summary: str
    """One line."""
    stage: str
    """The station of the data's way that calls it."""
    process: str
    """Where it runs: `rollout` or `trainer`; in local mode both are one process."""
    forms: tuple[CallForm, ...]
    """Accepted call forms; of two that fit equally well, the first is taken."""
    default: str
    returns: str
    when: str
    on_error: OnError
    doc: str
    example: str
    """Python source that defines a function of the native form, named as `example_name`."""
    example_name: str
    runs_async: bool = True
    """The owner awaits it. Otherwise an async function runs on a loop of its own."""
    registered: Mapping[str, str] = field(default_factory=dict)
    """Built-in functions by name: dotted paths."""

    @property
    def leaf(self) -> str:
        """The leaf of the configuration tree."""
        return f"{self.slot}_path"

    @property
    def flag(self) -> str:
        """The command line's spelling."""
        return "--" + self.leaf.replace("_", "-")

    @property
    def key(self) -> str:
        """The TOML spelling."""
        return f"hooks.{self.leaf}"

    @property
    def where(self) -> str:
        """Flag and TOML key, for messages."""
        return f"{self.flag} (TOML: {self.key})"
