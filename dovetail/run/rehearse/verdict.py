"""What is said of one hook after its rehearsal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How a rehearsal ended."""

    OK = "ok"
    """It keeps its contract on every input."""
    FORM = "form"
    """Its call form fits; it was not called, because what calls it is not part of this run."""
    UNKNOWN = "unknown"
    """It could not be judged: an outside service, a missing package or file, a made-up input."""
    LOAD = "load"
    """It can't be loaded, or fits no call form."""
    FAULT = "fault"
    """It breaks its contract."""

    @property
    def failed(self) -> bool:
        """Whether a run with this hook could not work."""
        return self in (Outcome.LOAD, Outcome.FAULT)


@dataclass(frozen=True)
class Item:
    """One hook to rehearse."""

    slot: str
    path: str
    """What the user wrote."""
    leaf: str
    """The setting that named it."""


@dataclass
class Verdict:
    """What became of one item."""

    item: Item
    outcome: Outcome = Outcome.OK
    message: str = ""
    source: str = ""
    """file:line of the user's function."""
    form: str = ""
    """The call form that was found."""
    warnings: list[str] = field(default_factory=list)
    printed: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """Inverse of `to_dict`."""
        known = {**data, "item": Item(**data["item"]), "outcome": Outcome(data["outcome"])}
        return cls(**known)


class Fault(Exception):
    """The hook breaks its contract; the message says how."""


class Unjudged(Exception):
    """Whether the hook keeps its contract can't be told here; the message says why."""


class NotInRehearsal(AttributeError):
    """A stand-in was asked for something that only the real thing has."""
