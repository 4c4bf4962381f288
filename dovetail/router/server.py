"""The server: a socket, and an event loop that serves it: one of its own on its own thread, or one
that runs already."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn
import uvloop
from starlette.routing import BaseRoute

from dovetail.router import known
from dovetail.router.app import Behind, MakeMiddleware, make_app
from dovetail.router.bridge import Bridge
from dovetail.router.limits import Limits
from dovetail.router.protocol import BoundedProtocol
from dovetail.router.security import Access
from dovetail.types import ConfigError, EngineError

HOST = "127.0.0.1"

_START_S = 20.0
_CLOSE_S = 5.0
_BACKLOG = 4096
_OTHER_FILES = 1024
_DOORS = 16
"""uvloop takes one new connection per socket and turn of the loop, and a turn is long when much is
going on: with one socket, hundreds of clients that come at once wait for seconds."""


class _Server(uvicorn.Server):
    """Signals are the run's matter."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield


class RouterServer:
    """Serves `bridge`, on this machine alone unless told otherwise.

    The address is known, and taken, as soon as the object exists; requests are answered after
    `start` or `serve_on`. A thread that it makes is a daemon: it never keeps a process alive.

    Args:
        bridge: what answers.
        port: 0 takes a free one.
        access: the address that is listened on, and who is let in.
        limits: what requests may take.
        middleware: what stands before every request, the first of it outermost.
        args: what the middleware reads as its router's.
        behind: the engines of a fleet, where there are several.
        routes: further ones, which go before those of the same path.

    Raises:
        ConfigError: the port is taken, or not for this user.
    """

    def __init__(
        self,
        bridge: Bridge,
        port: int = 0,
        *,
        access: Access | None = None,
        limits: Limits | None = None,
        middleware: Sequence[MakeMiddleware] = (),
        args: Any = None,
        behind: Behind | None = None,
        routes: Sequence[BaseRoute] = (),
    ) -> None:
        access = access or Access(HOST)
        self.bridge, self.limits = bridge, limits or Limits()
        self.app = make_app(
            bridge,
            middleware,
            args,
            access=access,
            limits=self.limits,
            behind=behind,
            routes=routes,
        )
        self._socket = _bound(access.host, port)
        self.port: int = self._socket.getsockname()[1]
        self.host = _reachable(access.host)
        self._address = self.url.removeprefix("http://")
        if access.token is not None:
            known.learn(self._address, access.token)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._serving_on: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._over = threading.Event()

    @property
    def url(self) -> str:
        """`http://host:port`, as a client of this machine reaches it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve on a thread of its own, with the engine on `loop`, which the calling thread runs.
        Returns when a client can connect.

        Raises:
            EngineError: the server did not come up.
        """
        self.bridge.loop, self.bridge.thread_id = loop, threading.get_ident()
        self._server = self._made()
        self._thread = threading.Thread(target=self._serve, name="router", daemon=True)
        self._thread.start()
        waited = 0.0
        while not self._server.started and waited < _START_S and not self._over.wait(0.01):
            waited += 0.01
        if not self._server.started:
            raise self._not_started()

    def serve_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve on `loop`, which another thread runs, and on which the engine lives too. Returns
        when a client can connect.

        Raises:
            EngineError: the server did not come up.
        """
        asyncio.run_coroutine_threadsafe(self.serve_here(), loop).result(_START_S)

    async def serve_here(self) -> None:
        """As `serve_on`, for whoever is on that loop: it is the running one.

        Raises:
            EngineError: the server did not come up.
        """
        self._serving_on = asyncio.get_running_loop()
        self.bridge.loop, self.bridge.thread_id = self._serving_on, threading.get_ident()
        self._server = self._made()
        self._task = asyncio.create_task(self._server.serve(sockets=_doors(self._socket)))
        while not self._server.started:
            await asyncio.wait([self._task], timeout=0.01)
            if self._task.done():
                self._failure = self._task.exception()
                raise self._not_started()

    def close(self) -> None:
        """Take no more requests, end those under way, and give the port back. Not for the thread
        of a loop that `serve_on` got: there, await `aclose`."""
        loop = self._serving_on
        if loop is not None and loop.is_running():
            # Longer than it waits itself: else the port stays taken where that takes all its time.
            asyncio.run_coroutine_threadsafe(self.aclose(), loop).result(2 * _CLOSE_S)
        self.bridge.closing = True
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(_CLOSE_S)
            self._server.force_exit = True
        self._socket.close()
        known.forget(self._address)

    async def aclose(self) -> None:
        """As `close`, on the loop that serves."""
        self.bridge.end()
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await asyncio.wait([self._task], timeout=_CLOSE_S)
            self._server.force_exit = True
        self._socket.close()
        known.forget(self._address)

    def _made(self) -> _Server:
        _allow_files(self.limits.connections)
        return _Server(
            uvicorn.Config(
                self.app,
                loop="uvloop",
                http=functools.partial(BoundedProtocol, self.limits),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                # What clients do wrong is for them to read, not for the run's log.
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=self.limits.keep_alive_s,
                timeout_graceful_shutdown=1,
            )
        )

    def _serve(self) -> None:
        assert self._server is not None
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._server.serve(sockets=_doors(self._socket)))
        except BaseException as error:
            # Whoever waits in `start` tells it; a later failure shows in the requests.
            self._failure = error
        finally:
            self._over.set()

    def _not_started(self) -> EngineError:
        reason = f"{self._failure}" if self._failure else f"not within {_START_S:.0f} s"
        error = EngineError(
            f"the generation server at {self.url} did not start: {reason} "
            "(--serve-router false, TOML: router.serve_router, does without)"
        )
        error.__cause__ = self._failure
        return error


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise ConfigError(
            f"router_port {port} can't be served on {host}: {error.strerror}; expected a free port "
            "of 1024 or more, or 0 for any free one (--router-port, TOML: router.router_port), on "
            "an address of this machine (--router-host, TOML: router.router_host)"
        ) from error
    return made


def _doors(listening: socket.socket) -> list[socket.socket]:
    """The same socket several times."""
    return [listening, *(listening.dup() for _ in range(_DOORS - 1))]


def _reachable(host: str) -> str:
    """Where a client of this machine finds a server on `host`."""
    return {"0.0.0.0": HOST, "::": "::1"}.get(host, host)


def _allow_files(connections: int) -> None:
    """Each connection is a file, and many shells allow 1,024 of them only."""
    wanted = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted and soft != resource.RLIM_INFINITY:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
