"""`import slime.utils.types` gives `dovetail.types.sample` itself, when there is no slime.

Two parts. The directory `shims` holds a directory with one package per family. They are put at the
end of `sys.path` and of PYTHONPATH, which spawned and started Python processes inherit: so whatever
else is called `slime` comes first, nothing runs until somebody imports one, and children need no
hook of their own. PYTHONPATH stands before site-packages, hence a shim looks once more for a real
package behind it and becomes that one. Otherwise it puts a finder on `sys.meta_path` for the names
below it. The finder reads the alias tables: an address there is our module, the identical object,
so that isinstance, singletons and patched globals hold; a package that only leads to addresses is
made up.

A `sitecustomize` would run in every child and hide another one; a finder alone would not reach
children.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from dovetail.compat.missing import explain_missing, is_from_import, missing_module
from dovetail.compat.row import FAMILIES, Alias

SHIMS = Path(__file__).parent / "shims"
TABLES = ("dovetail.compat.tables.core", "dovetail.compat.tables.wide")


def install(families: Iterable[str] = FAMILIES) -> None:
    """Make the addresses of `families` importable here and in Python processes started from here.

    A family that is installed, or lies on the path, stays what it is. A second call adds families.

    Raises:
        ValueError: a family is none of slime, vime, miles.
    """
    families = tuple(families)
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ValueError(f"no aliases for {', '.join(unknown)}; expected of {', '.join(FAMILIES)}")
    shims = [str(SHIMS / family) for family in families]
    sys.path += [shim for shim in shims if shim not in sys.path]
    inherited = _inherited_path()
    inherited += [shim for shim in shims if shim not in inherited]
    os.environ["PYTHONPATH"] = os.pathsep.join(inherited)


def uninstall() -> None:
    """Undo `install`: the aliases are gone from the path and from `sys.modules`."""
    sys.path[:] = [entry for entry in sys.path if not _is_shim(entry)]
    inherited = [entry for entry in _inherited_path() if not _is_shim(entry)]
    os.environ["PYTHONPATH"] = os.pathsep.join(inherited)
    if not inherited:
        del os.environ["PYTHONPATH"]
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _FINDER]
    for name in list(sys.modules):
        if name.partition(".")[0] in _FINDER.families:
            del sys.modules[name]
    _FINDER.families.clear()


def installed() -> bool:
    """Whether `install` is in force, for any family."""
    return any(_is_shim(entry) for entry in sys.path)


def stand_in(family: str) -> None:
    """Called by a shim that was imported as `family`: become the real package, or the aliases'."""
    real = real_spec(family)
    if real is not None:
        _become(real)
        return
    _FINDER.families.add(family)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    sys.modules[family] = _package(family)


def real_spec(name: str) -> ModuleSpec | None:
    """Where `name` is found when the shims are left out; None: nowhere."""
    path = [entry for entry in sys.path if not _is_shim(entry)]
    for finder in sys.meta_path:
        if finder is _FINDER or not hasattr(finder, "find_spec"):
            continue
        spec = finder.find_spec(name, path if finder is PathFinder else None)
        if spec is not None and not _is_shim(spec.origin or ""):
            return spec
    return None


def _inherited_path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _is_shim(entry: str) -> bool:
    return entry.startswith(str(SHIMS))


def aliases() -> dict[str, str]:
    """Every foreign module name with the module of ours behind it."""
    if not _targets:
        for table in TABLES:
            rows: tuple[Alias, ...] = importlib.import_module(table).ALIASES
            _targets.update({name: row.module for row in rows for name in row.full_names()})
    return _targets


class AliasFinder(MetaPathFinder):
    """Answers for every name below the families that it stands in for."""

    def __init__(self) -> None:
        self.families: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The alias, or the package that leads to aliases.

        Raises:
            ModuleNotFoundError: there is neither; the message says what exists.
        """
        family, dot, _ = name.partition(".")
        if not dot or family not in self.families:
            return None
        if name in aliases():
            return ModuleSpec(name, _AliasLoader(aliases()[name]))
        if any(known.startswith(name + ".") for known in aliases()):
            return ModuleSpec(name, _PackageLoader(), is_package=True)
        raise missing_module(name, aliases())


class _AliasLoader(Loader):
    def __init__(self, target: str) -> None:
        self.target = target

    def exec_module(self, module: ModuleType) -> None:
        # The import system takes what stands here afterwards, and leaves its attributes alone.
        real = importlib.import_module(self.target)
        explain_missing(real, module.__name__)
        sys.modules[module.__name__] = real


class _PackageLoader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = _package(module.__name__)


def _package(name: str) -> ModuleType:
    package = _MadeUpPackage(name, "Leads to modules of dovetail; see dovetail.compat.")
    package.__path__ = []
    package.__spec__ = ModuleSpec(name, _PackageLoader(), is_package=True)
    package.__spec__.submodule_search_locations = []
    package.__package__ = name
    return package


class _MadeUpPackage(ModuleType):
    """A package with nothing of its own: its attributes are the modules below it."""

    def __getattr__(self, name: str) -> ModuleType:
        full = f"{self.__name__}.{name}"
        if any(known == full or known.startswith(full + ".") for known in aliases()):
            return importlib.import_module(full)
        if is_from_import(sys._getframe(1)):
            raise missing_module(full, aliases())
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        below = [n for n in aliases() if n.startswith(self.__name__ + ".")]
        depth = self.__name__.count(".") + 1
        return sorted({*super().__dir__(), *(n.split(".")[depth] for n in below)})


def _become(spec: ModuleSpec) -> None:
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    if spec.loader is not None:
        spec.loader.exec_module(module)


_FINDER = AliasFinder()
_targets: dict[str, str] = {}
