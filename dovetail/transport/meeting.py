"""Where engines meet the trainer's rank 0 to be given weights hand to hand: a store of its own.

    rank 0                                      engine
    announce: name, address ------------------> joins: takes the next rank
    waits until all have joined, says `go` ---> goes
    bucket 0: what it has, then the bytes ----> takes it, tensor by tensor
    ...                                         ...
    `end` ------------------------------------> all of it is there: `done`
    waits for every `done`

Who fails says `broken`, which everybody looks at while waiting. Nobody waits longer than the
patience agreed on. The store carries JSON and raw bytes only.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dovetail.types.errors import BrokenUpdateError
from dovetail.types.weights import Meeting

if TYPE_CHECKING:
    from torch.distributed import PrefixStore, TCPStore

T = TypeVar("T")

PATIENCE_S = 120.0
"""Longest wait for one another."""
_LOOK_S = 0.1
"""Between two looks at whether it is broken."""
_REST_S, _MOST_REST_S = 0.0002, 0.01
_BROKEN = "broken"
_QUEUE = 1024
_MOST_SAID = 500


def listening_at(host: str, timeout: timedelta, world: int | None = None) -> TCPStore:
    """A store at a port of its own; torch's own listener would take any address of the machine.

    Args:
        host: the one address that it listens at.
        world: how many will use it; None: anybody.
    """
    from torch.distributed import TCPStore

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        listener.listen(_QUEUE)
        return TCPStore(
            host,
            int(listener.getsockname()[1]),
            world,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listener.detach(),
        )


class Host:
    """Rank 0's store, at a port of its own.

    Args:
        host: the address that engines reach it at; nothing listens at others.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.store: TCPStore = listening_at(host, timedelta(seconds=PATIENCE_S))
        self.port = int(self.store.port)
        self._tries = itertools.count()

    def announce(
        self, transport: str, version: int, num_engines: int, backend: str, patience_s: float
    ) -> Meeting:
        """A meeting that nobody has heard of."""
        name = f"{os.getpid()}.{version}.{next(self._tries)}"
        return Meeting(
            transport, self.host, self.port, name, num_engines, backend, patience_s=patience_s
        )

    def table(self, meeting: Meeting) -> Table:
        """Rank 0's side of it."""
        return Table(meeting, self.store, 0)


class Table:
    """One meeting, as one of those who meet sees it.

    Raises (all methods):
        BrokenUpdateError: somebody said that it is broken, or is gone, or the patience is over.
    """

    def __init__(self, meeting: Meeting, store: TCPStore, rank: int) -> None:
        from torch.distributed import PrefixStore

        self.meeting, self.rank = meeting, rank
        self.store: PrefixStore = PrefixStore(meeting.name, store)
        self._written: set[str] = set()

    def say(self, key: str, facts: Any = None) -> None:
        """Tell all of them something."""
        self._written.add(key)
        self._asked(lambda: self.store.set(key, json.dumps(facts)))

    def hear(self, key: str) -> Any:
        """What somebody says, once it is said."""
        self._until(lambda: self.store.check([key]), key)
        return json.loads(self._asked(lambda: self.store.get(key)))

    def count(self, key: str, more: int = 1) -> int:
        """How many have done something, after so many more."""
        self._written.add(key)
        return int(self._asked(lambda: self.store.add(key, more)))

    def wait_for(self, key: str, number: int) -> None:
        """Wait until so many have done it."""
        self._written.add(key)
        self._until(lambda: self.store.add(key, 0) >= number, key)

    def break_off(self, reason: str) -> None:
        """Have nobody wait any longer."""
        self.store.set(_BROKEN, reason[:_MOST_SAID])

    def clear(self) -> None:
        """Forget what was said, when nobody reads it any more."""
        for key in self._written:
            self.store.delete_key(key)
        self._written.clear()

    def _until(self, ready: Callable[[], bool], key: str) -> None:
        began = looked = time.monotonic()
        rest = _REST_S
        while not self._asked(ready):
            time.sleep(rest)
            rest, now = min(2 * rest, _MOST_REST_S), time.monotonic()
            if now - looked < _LOOK_S:
                continue
            looked = now
            if self._asked(lambda: self.store.check([_BROKEN])):
                raise BrokenUpdateError(self._asked(lambda: self.store.get(_BROKEN)).decode())
            if now - began > self.meeting.patience_s:
                raise BrokenUpdateError(
                    f"{key!r} of {self.meeting.name} did not come within "
                    f"{self.meeting.patience_s:g} s"
                )

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except BrokenUpdateError:
            raise
        except RuntimeError as error:  # What torch raises when the store's process is gone.
            said = str(error).splitlines()[0][:_MOST_SAID]
            raise BrokenUpdateError(f"the trainer can't be reached: {said}") from error


def joined(meeting: Meeting) -> Table:
    """An engine's side, as one of those who were announced.

    Raises:
        BrokenUpdateError: as `Table`; or there are more engines than were announced.
    """
    table = Table(meeting, _client(meeting), 0)
    table.rank = table.count("joined")
    if table.rank > meeting.num_engines:
        raise BrokenUpdateError(f"{meeting.name} is for {meeting.num_engines} engines, all there")
    return table


def break_off(meeting: Meeting, reason: str) -> None:
    """Have nobody wait any longer; from any process, also when there is no meeting any more."""
    try:
        Table(meeting, _client(meeting), 0).break_off(reason)
    except (BrokenUpdateError, RuntimeError):
        return  # Its store is gone, and with it everybody's hope.


def _client(meeting: Meeting) -> TCPStore:
    from torch.distributed import TCPStore

    try:
        return TCPStore(
            meeting.host,
            meeting.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=meeting.patience_s),
        )
    except RuntimeError as error:
        said = str(error).splitlines()[0][:_MOST_SAID]
        raise BrokenUpdateError(
            f"the trainer at {meeting.host}:{meeting.port} can't be reached: {said}"
        ) from error
