"""All sessions of a server: opened, found, ended, and never more than there is room for.

Requests work on them on the server's loop; whoever opens and ends them may be on another thread.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dovetail.router.fields import RequestError
from dovetail.router.sessions.tree import Session, Turn
from dovetail.types import SamplingParams

_GONE = 410
_RETRY_S = 5.0


@dataclass(frozen=True)
class SessionLimits:
    """What sessions may take."""

    most: int = 100_000
    """Sessions at once."""
    idle_s: float = 3600.0
    """A session without a request for so long is forgotten."""
    memory_bytes: float = 4e9
    """Of everything that is recorded, about."""
    turns: int = 4096
    """Turns of one session."""


class SessionStore:
    """Sessions by id.

    Example:
        >>> store = SessionStore()
        >>> session = store.open(SamplingParams(temperature=1.0))
        >>> store.find(session.session_id) is session, len(store)
        (True, 1)
        >>> store.end(session.session_id) is session, len(store)
        (True, 0)
    """

    def __init__(self, limits: SessionLimits | None = None) -> None:
        self.limits = limits or SessionLimits()
        self.size_bytes = 0
        self.expired = 0
        """Sessions that nobody ended."""
        # Those used last stand last.
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(
        self,
        sampling: SamplingParams | None = None,
        *,
        session_id: str | None = None,
        max_context_len: int | None = None,
        evaluation: bool = False,
    ) -> Session:
        """A new session.

        Raises:
            RequestError: there are as many as there may be, or one has this id.
        """
        with self._lock:
            self._expire()
            if len(self._sessions) >= self.limits.most or self._is_full():
                raise RequestError(
                    f"{len(self._sessions)} sessions are open and hold {self.size_bytes / 1e9:.1f} "
                    f"GB: at most {self.limits.most} and {self.limits.memory_bytes / 1e9:g} GB "
                    "(--max-sessions, --session-memory-gb); end those that are over",
                    status=503,
                    retry_after_s=_RETRY_S,
                )
            name = session_id or secrets.token_hex(16)
            if name in self._sessions:
                raise RequestError(f"there is a session {name!r}", status=409, field="session_id")
            session = Session(
                session_id=name,
                sampling=sampling,
                max_context_len=max_context_len,
                evaluation=evaluation,
            )
            self._sessions[name] = session
            self.size_bytes += session.size_bytes
            return session

    def find(self, session_id: str) -> Session:
        """The session of this id.

        Raises:
            RequestError: it was never opened, or it is over.
        """
        with self._lock:
            session = self._sessions.get(session_id)
            if session is not None and not session.in_flight and self._is_idle(session):
                self._forget(session)
                self.expired += 1
                session = None
            if session is None:
                raise RequestError(
                    f"no session {session_id!r} is open here: it was never opened, was ended, or "
                    f"was not used for {self.limits.idle_s:g} s",
                    status=404,
                    field="session_id",
                )
            self._touch(session)
            return session

    def end(self, session_id: str) -> Session | None:
        """Take no more requests of it and end those under way; what it recorded. None: there is
        no such session."""
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                return None
            self._forget(session)
            for task in session.in_flight:
                task.get_loop().call_soon_threadsafe(task.cancel)
            return session

    @contextmanager
    def working(self, session: Session) -> Iterator[int]:
        """A request of the session is under way in this task; its number.

        Raises:
            RequestError: the session is over, or has no more room.
        """
        task = asyncio.current_task()
        assert task is not None, "requests are answered in tasks"
        with self._lock:
            self._refuse_if_over(session)
            if len(session.turns) >= self.limits.turns:
                raise RequestError(
                    f"the session has {len(session.turns)} turns, the most that are recorded "
                    "(--session-max-turns)",
                    status=400,
                )
            number = session.asked
            session.enter(task)
        try:
            yield number
        finally:
            with self._lock:
                session.leave(task)
                if not session.closed:
                    self._touch(session)

    def record(self, session: Session, turn: Turn) -> None:
        """Add a turn.

        Raises:
            RequestError: the session ended meanwhile, or there is no memory left.
        """
        with self._lock:
            self._refuse_if_over(session)
            if self._is_full():
                self._expire()
            if self._is_full():
                raise RequestError(
                    f"sessions hold {self.size_bytes / 1e9:.1f} GB, the most that is recorded "
                    "(--session-memory-gb)",
                    status=503,
                    retry_after_s=_RETRY_S,
                )
            before = session.size_bytes
            session.record(turn)
            self.size_bytes += session.size_bytes - before

    def _refuse_if_over(self, session: Session) -> None:
        if session.closed or session.aborted:
            raise RequestError(f"session {session.session_id!r} is over", status=_GONE)

    def _touch(self, session: Session) -> None:
        session.used_at = time.monotonic()
        self._sessions.move_to_end(session.session_id)

    def _is_idle(self, session: Session) -> bool:
        return time.monotonic() - session.used_at > self.limits.idle_s

    def _is_full(self) -> bool:
        return self.size_bytes > self.limits.memory_bytes

    def _expire(self) -> None:
        """Forget those that nobody used for long; the one used longest ago stands first."""
        for _ in range(len(self._sessions)):
            oldest = next(iter(self._sessions.values()))
            if not self._is_idle(oldest):
                return
            if oldest.in_flight:
                self._touch(oldest)
                continue
            self._forget(oldest)
            self.expired += 1

    def _forget(self, session: Session) -> None:
        session.closed = True
        del self._sessions[session.session_id]
        self.size_bytes -= session.size_bytes
