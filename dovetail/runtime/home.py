"""Where an engine is started: beside the run, or wherever a cluster has a place for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dovetail.engines.process import HeldPort, ServerProcess


class Server(Protocol):
    """What is needed of an engine's process: `engines.process.ServerProcess`, or one elsewhere."""

    @property
    def log_file(self) -> Path: ...

    @property
    def alive(self) -> bool: ...

    @property
    def stopped(self) -> bool: ...

    @property
    def pids(self) -> list[int]: ...

    @property
    def ending(self) -> str: ...

    @property
    def log_tail(self) -> str: ...

    @property
    def end_of_log(self) -> str: ...

    def start(self) -> None: ...

    async def wait_ready(self, probe: Callable[[], Awaitable[bool]], timeout_s: float) -> None: ...

    async def terminate(self, grace_s: float = ...) -> None: ...


class Port(Protocol):
    """A port that only the engine meant for it can listen on."""

    @property
    def number(self) -> int: ...

    @property
    def url(self) -> str: ...

    def close(self) -> None: ...


class Home(Protocol):
    """Where an engine is started."""

    def reserve(self) -> Port:
        """A port there."""
        ...

    def server(
        self, command: Sequence[str], *, log_file: Path, name: str, env: Mapping[str, str]
    ) -> Server:
        """What will be started there."""
        ...


class ThisMachine:
    """Implements `Home`: beside the run."""

    def reserve(self) -> Port:
        """As `Home.reserve`."""
        return HeldPort()

    def server(
        self, command: Sequence[str], *, log_file: Path, name: str, env: Mapping[str, str]
    ) -> Server:
        """As `Home.server`."""
        return ServerProcess(command, log_file=log_file, name=name, env=env)
