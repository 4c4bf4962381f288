"""What an import of something that is not covered says: what exists instead."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from types import FrameType, ModuleType

_IMPORT_FROM = dis.opmap["IMPORT_FROM"]
_LISTED = 20


def missing_module(name: str, known: Iterable[str]) -> ModuleNotFoundError:
    """The error for a module that no row has."""
    family = name.partition(".")[0]
    own = sorted(n for n in known if n.startswith(family + "."))
    last = name.rpartition(".")[2]
    near = get_close_matches(name, own, n=3, cutoff=0.7)
    near += [n for n in own if n.rpartition(".")[2] == last and n not in near]
    parent = name.rpartition(".")[0]
    beside = [n for n in own if n.startswith(parent + ".")] or own
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ModuleNotFoundError(
        f"dovetail has no {name}; {hint}{parent if beside is not own else family} has "
        f"{_listed(beside)}. (No {family} is installed; python -m dovetail.compat --list shows "
        "every name)",
        name=name,
    )


def explain_missing(module: ModuleType, address: str) -> None:
    """Let `from ADDRESS import NAME` of a name that `module` lacks say what it has."""
    if type(module) is ModuleType:
        module.__class__ = _Aliased
    if isinstance(module, _Aliased):
        module.__dict__.setdefault("__dovetail_aliases__", []).append(address)


def is_from_import(frame: FrameType) -> bool:
    """Whether `frame` stands at `from ... import NAME`: that turns an AttributeError into a message
    of its own, so ours has to be an ImportError, while hasattr and getattr need the former."""
    return frame.f_code.co_code[max(frame.f_lasti, 0)] == _IMPORT_FROM


class _Aliased(ModuleType):
    """A module of ours that is imported under foreign addresses too."""

    def __getattr__(self, name: str) -> object:
        if is_from_import(sys._getframe(1)):
            raise ImportError(_no_name(self, name), name=self.__name__, path=self.__file__)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _no_name(module: ModuleType, name: str) -> str:
    public = sorted(getattr(module, "__all__", None) or filter(_is_own(module), vars(module)))
    addresses = list(dict.fromkeys(module.__dict__["__dovetail_aliases__"]))
    near = get_close_matches(name, public, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"cannot import name {name!r} from {' / '.join(addresses)}, which is {module.__name__} "
        f"here; {hint}it has {_listed(public)}"
    )


def _is_own(module: ModuleType) -> Callable[[str], bool]:
    """Of the names in a module, those that are no tools that it imported for itself."""

    def own(name: str) -> bool:
        value = getattr(module, name)
        home = getattr(value, "__module__", None) or "dovetail"
        return not (name.startswith("_") or isinstance(value, ModuleType)) and (
            home.partition(".")[0] == "dovetail"
        )

    return own


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
