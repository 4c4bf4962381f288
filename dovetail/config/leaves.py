"""The declarations, read once: every leaf of the tree with what flags, TOML, help and docs need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dovetail.config.run import RunConfig
from dovetail.config.sections import Section

_WORDS = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "list[str]": "a list of strings",
    "list[int]": "a list of integers",
    "json": "a JSON object (a table in TOML)",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_BOUNDS |= {"pattern": "of the form"}


@dataclass(frozen=True)
class Leaf:
    """One knob: where it is declared, and how it is written."""

    name: str
    section: str
    kind: Literal["bool", "int", "float", "str", "choice", "list[str]", "list[int]", "json"]
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    optional: bool = False
    """It can be unset (None)."""
    bounds: str = ""
    """For a person, e.g. `at least 1`."""

    @property
    def flag(self) -> str:
        """Its spelling on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def key(self) -> str:
        """Its spelling in TOML: section.name."""
        return f"{self.section}.{self.name}"

    @property
    def is_list(self) -> bool:
        """Whether a flag takes several values."""
        return self.kind.startswith("list")

    @property
    def adds_up(self) -> bool:
        """Whether a repeated flag adds to what it gave before: lists of functions."""
        return self.is_list and self.section == "hooks"

    @property
    def can_be_negated(self) -> bool:
        """Whether `--no-<name>` exists: false, unset or empty."""
        return self.kind in ("bool", "json") or self.is_list or self.optional

    @property
    def empty(self) -> Any:
        """The value that `--no-<name>` gives."""
        if self.kind == "bool":
            return False
        if self.optional:
            return None
        return {} if self.kind == "json" else []

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        what = f"one of {', '.join(self.choices)}" if self.choices else _WORDS[self.kind]
        return f"{what} ({self.bounds})" if self.bounds else what


def cure(name: str, value: Any = None) -> str:
    """How to set a leaf by flag and TOML key, e.g. `--lr 1e-6 (TOML: optimizer.lr)`."""
    leaf = leaves()[name]
    flag = leaf.flag
    if value is False and leaf.kind == "bool":
        flag = "--no-" + leaf.flag[2:]
    elif value is not None and value is not True:
        flag = f"{flag} {value}"
    return f"{flag} (TOML: {leaf.key})"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, or None when nothing is similar."""
    found = get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def sections() -> dict[str, type[Section]]:
    """Section classes by TOML table, in reading order."""
    found = {}
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        found[name] = field.annotation
    return found


@cache
def leaves() -> dict[str, Leaf]:
    """Every leaf by name, in reading order."""
    found: dict[str, Leaf] = {}
    for leaf in _declared():
        assert leaf.name not in found, f"leaf {leaf.name} is declared twice"
        found[leaf.name] = leaf
    return found


def _declared() -> Iterator[Leaf]:
    for section, declaration in sections().items():
        for name, field in declaration.model_fields.items():
            yield _leaf(section, name, field)


def _leaf(section: str, name: str, field: FieldInfo) -> Leaf:
    annotation, optional = _without_none(field.annotation)
    choices: tuple[str, ...] = ()
    kind: Any
    if get_origin(annotation) is Literal:
        kind, choices = "choice", get_args(annotation)
    elif get_origin(annotation) is list:
        kind = f"list[{get_args(annotation)[0].__name__}]"
    elif get_origin(annotation) is dict:
        kind = "json"
    else:
        kind = annotation.__name__
    return Leaf(
        name=name,
        section=section,
        kind=kind,
        default=field.get_default(call_default_factory=True),
        help=field.description or "",
        choices=choices,
        optional=optional,
        bounds=_bounds(field),
    )


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, False
    (inner,) = (a for a in get_args(annotation) if a is not NoneType)
    return inner, True


def _bounds(field: FieldInfo) -> str:
    parts = [
        f"{word} {getattr(constraint, attribute)}"
        for constraint in field.metadata
        for attribute, word in _BOUNDS.items()
        if getattr(constraint, attribute, None) is not None
    ]
    return ", ".join(parts)
