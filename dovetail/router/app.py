"""The ASGI application: every route of every dialect, and one shape of error for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from dovetail.router import control
from dovetail.router.bridge import Bridge
from dovetail.router.dialects import openai, sglang, vllm
from dovetail.router.fields import RequestError
from dovetail.router.respond import failure

log = logging.getLogger(__name__)

# A page in somebody's browser must not reach the engine under a name of its own.
_HOSTS = ["127.0.0.1", "localhost"]


@dataclass
class RouterView:
    """What middleware of the slime family reads of its router."""

    args: Any
    app: Any = None
    verbose: bool = False
    worker_request_counts: dict[str, int] = field(default_factory=dict)
    """Requests under way by address; there is one."""
    worker_failure_counts: dict[str, int] = field(default_factory=dict)
    dead_workers: set[str] = field(default_factory=set)
    max_weight_version: int | None = None


MakeMiddleware = Callable[[ASGIApp, RouterView], Any]
"""Gives an ASGI application, or an object whose `dispatch(request, call_next)` is awaited."""


def make_app(
    bridge: Bridge, middleware: Sequence[MakeMiddleware] = (), args: Any = None
) -> Starlette:
    """The application over `bridge`, behind the users' middleware, the first of it outermost."""
    view = RouterView(args)
    found = [*sglang.routes(bridge), *vllm.routes(bridge), *openai.routes(bridge)]
    view.app = Starlette(
        routes=[*found, *control.routes(bridge)],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS),
            *(Middleware(_as_asgi, make=make, view=view) for make in middleware),
        ],
        exception_handlers={
            RequestError: _request_error,
            HTTPException: _http_error,
            Exception: _unexpected,
        },
    )
    return view.app


def _as_asgi(app: ASGIApp, make: MakeMiddleware, view: RouterView) -> ASGIApp:
    made = make(app, view)
    if callable(made):
        return made  # type: ignore[no-any-return]
    return BaseHTTPMiddleware(app, dispatch=made.dispatch)


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return failure(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "no such path", 405: f"the method {request.method} is not for this path"}
    message = f"{request.url.path}: {said.get(error.status_code, error.detail)}"
    return failure(RequestError(message, status=error.status_code))


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    message = f"{request.url.path} failed: {type(error).__name__}: {error}"
    return failure(RequestError(message, status=500))
