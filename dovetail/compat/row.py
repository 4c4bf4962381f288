"""The format of the alias tables."""

from __future__ import annotations

from dataclasses import dataclass

SLIME, VIME, MILES = "slime", "vime", "miles"
FAMILIES = (SLIME, VIME, MILES)


@dataclass(frozen=True, slots=True)
class Alias:
    """One row: `module` is what the families import under each of `addresses`.

    The module may be a package: then its own files are no addresses, they need rows of their own.

    Example:
        >>> Alias("dovetail.types.sample", ("utils.types",)).full_names()
        ('slime.utils.types', 'vime.utils.types', 'miles.utils.types')
    """

    module: str
    """Ours, dotted."""
    addresses: tuple[str, ...]
    """Theirs, dotted, without the family; old and new places of a module that moved."""
    families: tuple[str, ...] = FAMILIES

    def full_names(self) -> tuple[str, ...]:
        """Every foreign module name of this row."""
        return tuple(
            f"{family}.{address}" for family in self.families for address in self.addresses
        )
