"""What one row of the hook table says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from dovetail.config.leaves import leaves

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
    KEEP = "keep"
    """What was made until then is kept, with a warning; without any its group is left out."""


class Kind(StrEnum):
    """What the user gives."""

    FUNCTION = "function"
    """It is called each time."""
    FACTORY = "factory"
    """A class or function; what it makes, once, is used from then on."""
    OBJECT = "object"
    """A value that is used as it is."""


OWNERS: Mapping[str, str] = {
    "megatron": "a Megatron trainer",
    "router": "a router of this package's own",
    "session server": "a session server",
    "weights on disk": "weights published through files",
    "asynchronous runtime": "the asynchronous runtime",
    "multi-turn generate": "miles' stock multi-turn generate function",
}
"""Parts that call hooks and that only some runs have, and what they are, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """One way in which a function of the slot is called."""

    families: tuple[str, ...]
    positional: tuple[str, ...] = ()
    """Names of the values passed by position, in order."""
    named: tuple[str, ...] = ()
    """Values passed by keyword: a function gets those that it names, and must name one at least."""
    keywords: tuple[str, ...] = ()
    """Further values, passed by keyword to functions that name them."""
    to_var_keywords: bool = False
    """Functions with `**kwargs` get `keywords` too."""
    construct: tuple[str, ...] | None = None
    """For classes: the values of the constructor; the instance is called."""
    makes: tuple[str, ...] = ()
    """The call makes an object with these methods; a class is called by constructing it."""
    told_by: tuple[str, ...] = ()
    """Names and annotations of the last positional parameter that speak for this form where others
    fit as well. Annotations are written without modules."""
    batched: bool = False
    """It takes a whole group where its plain sibling takes one sample."""
    origin: str = ""
    """Where it comes from, when documents and call sites differ."""
    shown: str = ""
    """For a person, where it is not called at all."""

    @property
    def signature(self) -> str:
        """For a person: `(args, sample[, evaluation=])`."""
        if self.shown:
            return self.shown
        inside = ", ".join([*self.positional, *(f"{name}=" for name in self.named)])
        optional = "".join(f"[, {name}=]" for name in self.keywords)
        if self.construct is not None:
            return f"class: __init__({', '.join(self.construct)}), __call__({inside}{optional})"
        made = f" -> object with {', '.join(self.makes)}" if self.makes else ""
        return f"({inside}{optional}){made}"

    @property
    def label(self) -> str:
        """Families, and the origin when there is one."""
        names = ", ".join(self.families)
        return f"{names} ({self.origin})" if self.origin else names


@dataclass(frozen=True, slots=True, kw_only=True)
class HookSpec:
    """One hook. Loading, checks, `--help`, docs, `dovetail hooks` and contract tests read it."""

    slot: str
    stage: str
    """The station of the data's way that calls it."""
    process: str
    """Where it runs: `rollout` (the run's own), `trainer` (in mode local the same one) or
    `engine`."""
    forms: tuple[CallForm, ...]
    """Accepted call forms; of two that fit equally well, the first is taken."""
    default: str
    returns: str
    when: str
    on_error: OnError = OnError.STOP
    doc: str
    example: str
    """Python source that defines a function of the native form, named as `example_name`."""
    example_name: str
    runs_async: bool = True
    """The owner awaits it. Otherwise an async function runs on a loop of its own."""
    registered: Mapping[str, str] = field(default_factory=dict)
    """Built-in functions by name: dotted paths."""
    kind: Kind = Kind.FUNCTION
    owner: str | None = None
    """One of OWNERS where only some runs have what calls it."""
    repeatable: bool = False
    """Its leaf is a list: several functions, one after the other."""
    leaf_name: str | None = None
    """The leaf, where that is not `<slot>_path`."""
    time_limit: str | None = "hook_timeout_s"
    """The leaf with the seconds after which a call that has not returned is given up; None: it may
    take as long as it likes."""

    @property
    def summary(self) -> str:
        """One line: the help of its leaf."""
        return leaves()[self.leaf].help

    @property
    def leaf(self) -> str:
        """The leaf of the configuration tree."""
        return self.leaf_name or f"{self.slot}_path"

    @property
    def timed(self) -> bool:
        """Whether a call has a time limit."""
        return self.time_limit is not None

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
