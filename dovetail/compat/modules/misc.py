"""`utils.misc`: loading by path, singletons, and small tools that plugins use."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import socket
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from dovetail.hooks.load import load, split_family
from dovetail.hooks.table import spec_of

log = logging.getLogger(__name__)

_MAX_PORT = 65535


class FunctionRegistry:
    """Objects that `load_function` finds by a name instead of a path (miles)."""

    def __init__(self) -> None:
        self._registered: dict[str, Any] = {}

    @contextmanager
    def temporary(self, name: str, fn: Any) -> Iterator[None]:
        """`name` stands for `fn` inside the `with`.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._registered:
            raise ValueError(f"the name {name!r} is already registered")
        self._registered[name] = fn
        try:
            yield
        finally:
            del self._registered[name]

    def get(self, name: str) -> Any:
        """What `name` stands for; None: nothing."""
        return self._registered.get(name)


function_registry = FunctionRegistry()


def load_function(path: str | None, *, sync_required: bool = False) -> Any:
    """The object behind `pkg.mod.attr`, or any other path that a hook's flag takes; None of none.

    Raises:
        ImportError, AttributeError: there is no such module, or it lacks the name.
        HookError: as an ImportError is for them, for pkg.mod:attr and path/file.py:attr.
        ValueError: `sync_required`, and it is no callable or an async one.
    """
    if not path:
        return None
    found = function_registry.get(path)
    if found is None:
        found = _load(split_family(path)[1])
    if sync_required and not callable(found):
        raise ValueError(f"{path!r} is no callable but a {type(found).__name__}")
    if sync_required and inspect.iscoroutinefunction(found):
        raise ValueError(f"{path!r} is an async function; here it must be a plain one")
    return found


def _load(path: str) -> Any:
    module, dot, attribute = path.rpartition(".")
    if ":" in path or not dot:
        return load(spec_of("custom_generate_function"), path)
    return getattr(importlib.import_module(module), attribute)


class SingletonMeta(type):
    """Classes of which the first instance is the only one: later calls give it back."""

    _instances: ClassVar[dict[type, Any]] = {}

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls not in SingletonMeta._instances:
            SingletonMeta._instances[cls] = super().__call__(*args, **kwargs)
        return SingletonMeta._instances[cls]

    @staticmethod
    def forget(cls: type) -> None:
        """The next call of `cls` makes a new instance."""
        SingletonMeta._instances.pop(cls, None)

    @staticmethod
    def clear_all_instances() -> None:
        """Forget every instance: the next call of a class makes a new one."""
        SingletonMeta._instances.clear()


async def call_agent_abort_hook(args: Any) -> None:
    """Tell the agent that the rollout was aborted: `abort(args)` beside the agent function."""
    module = (getattr(args, "custom_agent_function_path", None) or "").rpartition(".")[0]
    if not module:
        return
    try:
        abort = load_function(f"{module}.abort")
    except (AttributeError, ImportError):
        return  # Having one is its own choice.
    try:
        await abort(args)
    # It only makes the end come sooner; a rollout that is complete is not lost over it.
    except Exception as error:
        log.warning("%s.abort failed", module, exc_info=error)


def exec_command(cmd: str, capture_output: bool = False) -> str | None:
    """Run a line of bash; its output with `capture_output`.

    Raises:
        subprocess.CalledProcessError: it left with another code than 0.
    """
    log.info("running: %s", cmd)
    done = subprocess.run(
        ["bash", "-c", cmd], check=True, capture_output=capture_output, text=capture_output or None
    )
    return done.stdout if capture_output else None


def is_port_available(port: int) -> bool:
    """Whether this machine can listen on `port`."""
    if not 0 < port <= _MAX_PORT:
        return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def get_free_port(start_port: int = 10000, consecutive: int = 1) -> int:
    """The first of `consecutive` free ports in a row, from `start_port` on.

    Raises:
        OSError: there are none.
    """
    for port in range(start_port, _MAX_PORT - consecutive + 2):
        if all(is_port_available(port + offset) for offset in range(consecutive)):
            return port
    raise OSError(f"no {consecutive} free ports in a row from {start_port} on")


def get_current_node_ip() -> str:
    """The address under which other machines reach this one; 127.0.0.1 without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: it only chooses the interface.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def should_run_periodic_action(
    rollout_id: int,
    interval: int | None,
    num_rollout_per_epoch: int | None = None,
    num_rollout: int | None = None,
) -> bool:
    """Whether something that is due every `interval` steps is due after step `rollout_id`.

    It is due at the end of an epoch and of the run as well, and never without an interval.
    """
    if interval is None:
        return False
    done = rollout_id + 1
    periods = (interval, num_rollout_per_epoch)
    return done == num_rollout or any(period and done % period == 0 for period in periods)


should_run_checkpoint_action = should_run_periodic_action


async def as_completed_async(tasks: Iterable[Any]) -> AsyncIterator[Any]:
    """What the tasks return, in the order in which they finish."""
    for task in asyncio.as_completed(list(tasks)):
        yield await task


def filter_keys(d: Mapping[str, Any], interest_keys: Sequence[str]) -> dict[str, Any]:
    """The entries of these keys.

    Raises:
        KeyError: one is missing.
    """
    return {key: d[key] for key in interest_keys}
