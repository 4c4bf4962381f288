"""The server: a socket of this machine, and a thread that serves it on an event loop of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from typing import Any

import uvicorn

from dovetail.router.app import MakeMiddleware, make_app
from dovetail.router.bridge import Bridge
from dovetail.types import ConfigError, EngineError

HOST = "127.0.0.1"

_START_S = 20.0
_CLOSE_S = 5.0
# Between two turns of a conversation a whole training step may lie.
_KEEP_ALIVE_S = 3600
_BACKLOG = 4096


class RouterServer:
    """Serves `bridge` on this machine.

    The address is known, and taken, as soon as the object exists; requests are answered after
    `start`. Its thread is a daemon: it never keeps a process alive.

    Args:
        bridge: what answers.
        port: 0 takes a free one.
        middleware: what stands before every request, the first of it outermost.
        args: what the middleware reads as its router's.

    Raises:
        ConfigError: the port is taken, or not for this user.
    """

    def __init__(
        self,
        bridge: Bridge,
        port: int = 0,
        *,
        middleware: Sequence[MakeMiddleware] = (),
        args: Any = None,
    ) -> None:
        self.bridge, self._middleware, self._args = bridge, middleware, args
        self.host = HOST
        self._socket = _bound(port)
        self.port: int = self._socket.getsockname()[1]
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._over = threading.Event()

    @property
    def url(self) -> str:
        """`http://host:port`."""
        return f"http://{self.host}:{self.port}"

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve, with the engine on `loop`, which the calling thread runs. Returns when a client
        can connect.

        Raises:
            EngineError: the server did not come up.
        """
        self.bridge.loop, self.bridge.thread_id = loop, threading.get_ident()
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(self.bridge, self._middleware, self._args),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="router", daemon=True)
        self._thread.start()
        waited = 0.0
        while not self._server.started and waited < _START_S and not self._over.wait(0.01):
            waited += 0.01
        if not self._server.started:
            reason = f"{self._failure}" if self._failure else f"not within {_START_S:.0f} s"
            raise EngineError(
                f"the generation server at {self.url} did not start: {reason} "
                "(--serve-router false, TOML: router.serve_router, does without)"
            ) from self._failure

    def close(self) -> None:
        """Take no more requests, end those under way, and give the port back."""
        self.bridge.closing = True
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(_CLOSE_S)
            self._server.force_exit = True
        self._socket.close()

    def _serve(self) -> None:
        assert self._server is not None
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        except BaseException as error:
            # Whoever waits in `start` tells it; a later failure shows in the requests.
            self._failure = error
        finally:
            self._over.set()


def _bound(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((HOST, port))
    except OSError as error:
        made.close()
        raise ConfigError(
            f"router_port {port} can't be served on {HOST}: {error.strerror}; expected a free port "
            "of 1024 or more, or 0 for any free one (--router-port, TOML: router.router_port)"
        ) from error
    return made
