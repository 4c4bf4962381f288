"""Settings on their way in: names are understood, the last one wins, origins are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dovetail.config.aliases import (
    ALIASES,
    FIXED,
    MEANT,
    UNSUPPORTED,
    WITHOUT_EFFECT,
    unsupported,
)
from dovetail.config.leaves import leaves, nearest
from dovetail.config.passthrough import is_passthrough
from dovetail.types.errors import ConfigError


@dataclass(frozen=True)
class Strange:
    """A flag that `understood` refuses."""

    tokens: tuple[str, ...]
    """As they were written, values too."""
    error: ConfigError
    """What to say of it when no user's function knows it either."""


@dataclass
class Incoming:
    """What files and flags have set so far."""

    values: dict[str, Any] = field(default_factory=dict)
    """Leaf name to raw value; pydantic checks it later."""
    origins: dict[str, str] = field(default_factory=dict)
    passthrough: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    strange: list[Strange] = field(default_factory=list)
    """Flags that nobody here knows: a user's function may."""

    def put(self, name: str, value: Any, origin: str) -> None:
        """Take one setting that `understood` accepts."""
        alias = ALIASES.get(name)
        if alias is not None:
            if alias.constant is not None and value is False:
                return
            name, value = alias.leaf, alias.translate(value)
        if name in leaves():
            self.values[name] = value
            self.origins[name] = origin
        elif name in FIXED:
            _check_fixed(name, value, origin)
        elif name in WITHOUT_EFFECT:
            self.notes.append(f"without effect in this run: {origin} ({WITHOUT_EFFECT[name]})")
        else:
            self.passthrough[name] = value


def understood(name: str) -> bool:
    """Whether `Incoming.put` has a place for this name."""
    tables = (leaves(), ALIASES, FIXED, WITHOUT_EFFECT)
    return any(name in table for table in tables) or (
        is_passthrough(name) and name not in UNSUPPORTED
    )


def _check_fixed(name: str, value: Any, origin: str) -> None:
    if str(value) not in FIXED[name]:
        raise ConfigError(
            f"{name} got {value!r} from {origin}; here it is always {' or '.join(FIXED[name])}; "
            "leave it out"
        )


def unknown(name: str, written: str, where: str, *, style: str) -> ConfigError:
    """The error for a name that `understood` refuses.

    Args:
        name: with underscores.
        written: as the user wrote it.
        where: `on the command line`, or file, line and table.
        style: `flag` or `key`: how to write the suggestion.
    """
    reason = unsupported(name)
    if reason is not None:
        return ConfigError(f"{where}: {reason}")
    closest = MEANT.get(name) if style == "flag" else None
    closest = closest or nearest(name, [*leaves(), *ALIASES])
    if closest is None:
        hint = "dovetail train --help lists all of them"
    elif style == "flag":
        hint = f"did you mean --{closest.replace('_', '-')}?"
    else:
        leaf = leaves().get(ALIASES[closest].leaf if closest in ALIASES else closest)
        assert leaf is not None
        hint = f"did you mean {closest}, in table [{leaf.section}]?"
    return ConfigError(f"{where}: unknown {style} {written}; {hint}")
