"""The ASGI application: every route of every dialect, and one shape of error for all of them.

Guard (who) -> Bounded (how much) -> Counted (figures) -> users' middleware -> routes
                                                                          +-> proxy, for requests in
                                                                              the engines' own form
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from dovetail.router import control, metrics, openapi, workers
from dovetail.router.balancer.proxy import PassThrough, Proxy
from dovetail.router.bridge import Bridge
from dovetail.router.dialects import openai, sglang, tokens, vllm
from dovetail.router.fields import RequestError
from dovetail.router.limits import Bounded, Limits
from dovetail.router.metrics import Counted, Figures
from dovetail.router.respond import CLIENT_GONE, failure
from dovetail.router.security import Access, Guard
from dovetail.router.workers import Behind
from dovetail.types.ports import Tokenizer

log = logging.getLogger(__name__)


@dataclass
class RouterView:
    """What middleware of the slime family reads of its router."""

    args: Any
    app: Any = None
    verbose: bool = False
    behind: Behind | None = None
    bridge: Bridge | None = None
    radix_tree: Any = None
    """What texts are made of, once `RadixTreeMiddleware` stands before the routes."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's; asked for when there is one, which is on the first request."""
        assert self.bridge is not None
        return self.bridge.tokenizer

    @property
    def aborts_asked(self) -> int | None:
        """How often requests were ended before their time, by clients or by the run; None where
        nothing else ends them: the engine of this process."""
        return None if self.behind is None else self.behind.pool.aborts_asked

    @property
    def worker_request_counts(self) -> dict[str, int]:
        """Requests under way by address; empty for an engine of this process."""
        return {one.url: one.in_flight for one in self._workers()}

    @property
    def worker_failure_counts(self) -> dict[str, int]:
        """Requests that each engine broke off."""
        return {one.url: one.failures for one in self._workers()}

    @property
    def dead_workers(self) -> set[str]:
        """Addresses of engines that get no requests because they died."""
        return {one.url for one in self._workers() if one.state == "dead"}

    @property
    def max_weight_version(self) -> int | None:
        """Of the newest weights that engines were given."""
        return None if self.behind is None else self.behind.pool.weight_version

    def _workers(self) -> list[Any]:
        return [] if self.behind is None else list(self.behind.pool.workers.values())


MakeMiddleware = Callable[[ASGIApp, RouterView], Any]
"""Gives an ASGI application, or an object whose `dispatch(request, call_next)` is awaited."""


def make_app(
    bridge: Bridge,
    middleware: Sequence[MakeMiddleware] = (),
    args: Any = None,
    *,
    access: Access,
    limits: Limits,
    behind: Behind | None = None,
    routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """The application over `bridge`, behind the users' middleware, the first of it outermost.

    Args:
        bridge: what answers.
        middleware: the users'.
        args: what they read as their router's.
        access: who is let in.
        limits: what requests may take.
        behind: the engines of a fleet, where there are several.
        routes: further ones, which go before those of the same path.
    """
    view = RouterView(args, behind=behind, bridge=bridge)
    figures = Figures(bridge, behind)
    found = [*sglang.routes(bridge), *vllm.routes(bridge), *openai.routes(bridge)]
    facts = [
        *workers.routes(bridge, behind),
        *metrics.routes(figures),
        *control.routes(bridge, behind),
        *openapi.routes(),
    ]
    view.app = Starlette(
        routes=[*routes, *found, *tokens.routes(bridge), *facts],
        middleware=[
            Middleware(Guard, access=access),
            Middleware(Bounded, limits=limits),
            Middleware(Counted, figures=figures),
            *(Middleware(_as_asgi, make=make, view=view) for make in middleware),
            *([Middleware(PassThrough, proxy=Proxy(behind.pool))] if behind else []),
        ],
        exception_handlers={
            RequestError: _request_error,
            HTTPException: _http_error,
            ClientDisconnect: _client_gone,
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
    answer = failure(RequestError(message, status=error.status_code))
    answer.headers.update(error.headers or {})
    return answer


async def _client_gone(request: Request, error: Exception) -> Response:
    return failure(RequestError("the client is gone", status=CLIENT_GONE))


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    message = f"{request.url.path} failed: {type(error).__name__}: {error}"
    return failure(RequestError(message, status=500))
