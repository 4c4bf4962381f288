"""From what a person writes to an object: a registered name, a dotted path, or file and name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from dovetail.hooks.spec import FAMILIES, HookSpec
from dovetail.hooks.table import spec_of
from dovetail.types import HookError

FOREIGN_NAMES = "dovetail.compat"
"""Gives plugins of other frameworks what they import. By name, as it stands on a higher layer."""

_registered: dict[tuple[str, str], Any] = {}
_WAYS = (
    "a registered name, pkg.mod.attr, pkg.mod:attr or path/file.py:attr "
    f"(with {', '.join(f'{family}:' for family in FAMILIES)} before it to force a call form)"
)


def register(slot: str, name: str) -> Callable[[Any], Any]:
    """Decorator: `name` stands for the decorated function wherever a path of `slot` is taken.

    Raises:
        HookError: there is no such slot, or another function has the name.
    """
    spec = spec_of(slot)

    def keep(target: Any) -> Any:
        taken = _registered.get((slot, name), target)
        if taken is not target or name in spec.registered:
            raise HookError(f"{name!r} is already registered for {spec.flag}")
        _registered[slot, name] = target
        return target

    return keep


def is_registered(slot: str, name: str) -> bool:
    """Whether `name` stands for an object of this process."""
    return (slot, name) in _registered


def admit_foreign_imports() -> None:
    """From here on `import slime`, `vime` and `miles` work where they are not installed."""
    importlib.import_module(FOREIGN_NAMES).start_run()


def split_family(path: str) -> tuple[str | None, str]:
    """`slime:pkg.fn` -> ("slime", "pkg.fn"). `slime:fn` is the attribute fn of the module slime."""
    head, _, rest = path.partition(":")
    forced = head in FAMILIES and bool(rest) and (head == "native" or "." in rest or ":" in rest)
    return (head, rest) if forced else (None, path)


def load(spec: HookSpec, path: str) -> Any:
    """The object behind `path` (without a family).

    Raises:
        HookError: nothing is there, or importing it failed; the message has the user's line.
    """
    if (spec.slot, path) in _registered:
        return _registered[spec.slot, path]
    path = spec.registered.get(path, path)
    module_part, colon, attribute = path.rpartition(":")
    if not colon and "." not in path:
        raise HookError(f"{spec.where}: {_no_name(spec, path)}")
    if not colon:
        return _load_dotted(spec, path)
    if module_part.endswith(".py"):
        return _attributes(spec, path, _import_file(spec, Path(module_part)), attribute)
    return _attributes(spec, path, _import(spec, path, module_part), attribute)


def _no_name(spec: HookSpec, path: str) -> str:
    names = sorted({*spec.registered, *(name for slot, name in _registered if slot == spec.slot)})
    near = get_close_matches(path, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = f" Registered here: {', '.join(names)}." if names else ""
    return f"no function {path!r}{hint}.{known} Give {_WAYS}"


def _load_dotted(spec: HookSpec, path: str) -> Any:
    """`pkg.mod.attr`, or deeper `pkg.mod.Class.method`: the longest part that is a module."""
    if path.endswith(".py"):
        raise HookError(f"{spec.where}: {path!r} names no function; write {path}:NAME")
    parts = path.split(".")
    _see_working_directory()
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        if cut == 1 or _is_module(spec, path, name):
            return _attributes(spec, path, _import(spec, path, name), ".".join(parts[cut:]))
    raise AssertionError("a dotted path has a first part")


def _is_module(spec: HookSpec, path: str, name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
    # Finding a module imports its parents, which is the user's code.
    except (Exception, SystemExit) as error:
        raise _import_failed(spec, path, error) from error


def _import(spec: HookSpec, path: str, name: str) -> ModuleType:
    _see_working_directory()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        ours = not str(error).startswith("No module")  # says more: dovetail.compat knows the names
        below = error.name is not None and f"{name}.".startswith(f"{error.name}.")
        if below and not ours:
            raise HookError(
                f"{spec.where}: no module {error.name!r} for {path!r}. It is looked for in the "
                f"working directory ({os.getcwd()}) and on PYTHONPATH; a file is written as "
                "path/file.py:attr"
            ) from error
        raise _import_failed(spec, path, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(spec, path, error) from error


def _import_file(spec: HookSpec, file: Path) -> ModuleType:
    """A file is a module of its own stem, so that files beside it can import it and each other."""
    file = file.expanduser().resolve()
    if not file.is_file():
        beside = file.parent.glob("*.py") if file.parent.is_dir() else ()
        near = get_close_matches(file.name, [other.name for other in beside], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise HookError(f"{spec.where}: no file {file}{hint}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    importlib.invalidate_caches()
    try:
        found = importlib.util.find_spec(file.stem) if file.stem.isidentifier() else None
        if found is not None and found.origin and Path(found.origin).resolve() == file:
            return importlib.import_module(file.stem)
        return _import_under_own_name(file)
    except (Exception, SystemExit) as error:
        raise _import_failed(spec, str(file), error) from error


def _import_under_own_name(file: Path) -> ModuleType:
    """For a file whose stem is another module's name."""
    name = f"_dovetail_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _see_working_directory() -> None:
    """A console script does not have it on its path; last, so that it shadows nothing."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def _attributes(spec: HookSpec, path: str, module: ModuleType, dotted: str) -> Any:
    found: Any = module
    for name in dotted.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            public = [known for known in _members(found) if not known.startswith("_")]
            near = get_close_matches(name, public, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            where = getattr(module, "__file__", None) or module.__name__
            raise HookError(
                f"{spec.where}: {where} has no {name!r} (from {path!r}){hint}"
            ) from None
    return found


def _members(owner: Any) -> list[str]:
    submodules = pkgutil.iter_modules(getattr(owner, "__path__", ()))
    return [*dir(owner), *(module.name for module in submodules)]


def _import_failed(spec: HookSpec, path: str, error: BaseException) -> HookError:
    return HookError(
        f"{spec.where}: importing {path!r} failed at {blame(error)}: "
        f"{type(error).__name__}: {error}"
    )


def blame(error: BaseException, file: str | None = None, called: str | None = None) -> str:
    """`file:line, in function` of the user's code that raised: the innermost frame of `file` if it
    is there, else the innermost outside this package and the import machinery; else `called`, the
    place of what could not even be entered."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parent.parent)
    theirs = [f for f in frames if not f.filename.startswith((ours, "<frozen", importlib.__file__))]
    own = [frame for frame in theirs if frame.filename == file]
    if not theirs and called is not None:
        return called
    chosen = (own or theirs or list(frames))[-1:]
    return "".join(f"{f.filename}:{f.lineno}, in {f.name}" for f in chosen) or "an unknown place"
