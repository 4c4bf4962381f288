"""A model is loaded without torch's compiler and its tensors of many machines.

transformers imports `torch._dynamo` for a few decorators and `torch.distributed.tensor` for a check
of types: two seconds of every engine's start. A process that only serves needs neither; what needs
them after all, a model's own code or a user's function, still gets the real ones.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_ASKED = "is_torch_distributed_available"


@contextlib.contextmanager
def light_imports() -> Iterator[None]:
    """What is imported inside the block comes without them. Does nothing where the compiler is
    loaded already."""
    import torch  # noqa: F401

    if _COMPILER in sys.modules:
        yield
        return
    with _compiler_aside(), _on_one_machine():
        yield


class _Compiler(ModuleType):
    """In the place of the compiler while others are imported; the real one as soon as they want
    more than to be left alone by it."""

    def __init__(self) -> None:
        super().__init__(_COMPILER)
        spec = importlib.util.find_spec(_COMPILER)
        assert spec is not None and spec.submodule_search_locations is not None
        self.__spec__, self.__path__ = spec, spec.submodule_search_locations

    # What is said to a compiler of functions that are never compiled.

    def disable(self, fn: Any = None, *_: Any, **__: Any) -> Any:
        """The function, or what gives it back."""
        return self.allow_in_graph if fn is None else fn

    def allow_in_graph(self, fn: Any) -> Any:
        """The function."""
        return fn

    assume_constant_result = allow_in_graph

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
        return getattr(importlib.import_module(_COMPILER), name)


@contextlib.contextmanager
def _compiler_aside() -> Iterator[None]:
    aside = sys.modules[_COMPILER] = _Compiler()
    try:
        yield
    finally:
        if sys.modules.get(_COMPILER) is aside:
            del sys.modules[_COMPILER]


@contextlib.contextmanager
def _on_one_machine() -> Iterator[None]:
    """What transformers imports inside the block does not ask for other machines, then or later."""
    from transformers import utils
    from transformers.utils import import_utils

    real: Callable[[], bool] = getattr(import_utils, _ASKED)
    for module in (utils, import_utils):
        setattr(module, _ASKED, _no)
    try:
        yield
    finally:
        for module in (utils, import_utils):
            setattr(module, _ASKED, real)


def _no() -> bool:
    return False
