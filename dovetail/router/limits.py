"""How much of this machine requests may take: time, bytes, and how many at once.

What a connection does before there is a request is `dovetail.router.protocol`'s matter; from then
on `Bounded` counts.
"""

from __future__ import annotations

import asyncio
import ctypes
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dovetail.config.sections.router import RouterConfig
from dovetail.router.fields import RequestError
from dovetail.router.respond import failure

_BODIES = 8
_LARGE_BYTES = 2**22
_TRIM_AFTER_S = 3.0
"""Longer than a connection that was refused lingers."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one server."""

    body_bytes: int = 128_000_000
    """Of one request."""
    connections: int = 16_384
    request_s: float = 14_400.0
    """From its head to the last byte of its answer."""
    head_s: float = 20.0
    """For the request line and the headers."""
    head_bytes: int = 65_536
    body_s: float = 30.0
    """For a body, beside what it may take at `body_rate`."""
    body_rate: int = 10_000
    """Bytes per second that a body must come at, at least, on average."""
    keep_alive_s: int = 3600
    """Between two requests of a connection: two turns of a conversation may have a whole training
    step between them."""

    @classmethod
    def of(cls, config: RouterConfig) -> Limits:
        """As the settings have them."""
        return cls(
            body_bytes=int(config.router_max_body_mb * 1e6),
            connections=config.router_max_connections,
            request_s=config.router_request_timeout_s,
        )

    @property
    def bodies_bytes(self) -> int:
        """Of all requests under way together."""
        return _BODIES * self.body_bytes


def too_large(limits: Limits, got: str) -> RequestError:
    """The error for a body over the limit."""
    return RequestError(
        f"the body has {got} bytes, expected at most {limits.body_bytes} (--router-max-body-mb, "
        "TOML: router.router_max_body_mb)",
        status=413,
        field="body",
        got=f"{got} bytes",
        expected=f"at most {limits.body_bytes} bytes",
    )


class Bounded:
    """ASGI middleware: a request that takes too long ends, and bodies together stay within what
    the server may hold."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._held = 0
        self._trim: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held, started = 0, False

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            held += size
            self._held += size
            self._check(held)
            return message

        async def told(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        problem: RequestError | None = None
        try:
            async with asyncio.timeout(self._limits.request_s) as time:
                await self._app(scope, counted, told)
        except TimeoutError:
            if not time.expired():
                raise
            problem = self._overdue()
        except RequestError as error:
            # From `counted`, where it was a user's middleware that read the body.
            problem = error
        finally:
            self._held -= held
            if held > _LARGE_BYTES:
                self._trim_later()
        if problem is not None and not started:
            await failure(problem)(scope, receive, send)

    def _check(self, held: int) -> None:
        if held > self._limits.body_bytes:
            raise too_large(self._limits, f"more than {self._limits.body_bytes}")
        if self._held > self._limits.bodies_bytes:
            raise RequestError(
                f"the requests under way have {self._held} bytes in their bodies, and "
                f"{self._limits.bodies_bytes} are held at most: come later",
                status=503,
                retry_after_s=1.0,
            )

    def _trim_later(self) -> None:
        if self._trim is None:
            self._trim = asyncio.get_running_loop().call_later(_TRIM_AFTER_S, self._trim_now)

    def _trim_now(self) -> None:
        self._trim = None
        asyncio.get_running_loop().run_in_executor(None, _give_back)

    def _overdue(self) -> RequestError:
        return RequestError(
            f"not answered within {self._limits.request_s:g} s (--router-request-timeout-s, TOML: "
            "router.router_request_timeout_s)",
            status=504,
        )


def _give_back() -> None:
    """What bodies were in goes back to the system. After large ones were freed, glibc takes the
    next ones out of its heap, and whatever small comes to lie behind keeps hundreds of MB there."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
