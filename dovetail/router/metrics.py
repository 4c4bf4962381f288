"""GET /metrics: what the server did and does, as Prometheus reads it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dovetail.router.balancer.proxy import NATIVE
from dovetail.router.bridge import Bridge

if TYPE_CHECKING:
    from dovetail.router.workers import Behind

_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)
_PREFIX = "dovetail_router"
_STATES = ("starting", "ready", "dead", "draining")


class Figures:
    """The figures of one server."""

    def __init__(self, bridge: Bridge, behind: Behind | None) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            f"{_PREFIX}_requests",
            "Answered requests by route, method and status.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.latency = Histogram(
            f"{_PREFIX}_request_seconds",
            "Seconds from a request's head to the last byte of its answer, by route.",
            ["route"],
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self.active = Gauge(
            f"{_PREFIX}_requests_active", "Requests without a whole answer.", registry=self.registry
        )
        self.registry.register(_Facts(bridge, behind))
        self._of: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def of(self, route: str, method: str, status: int) -> tuple[Counter, Histogram]:
        """Those with these labels: to look them up takes longer than to count."""
        found = self._of.get((route, method, status))
        if found is None:
            found = self.requests.labels(route, method, str(status)), self.latency.labels(route)
            self._of[route, method, status] = found
        return found

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Facts(Collector):
    """Read where they stand, when somebody asks."""

    def __init__(self, bridge: Bridge, behind: Behind | None) -> None:
        self._bridge, self._behind = bridge, behind

    def collect(self) -> Iterator[Metric]:
        bridge = self._bridge
        yield _counter("prompt_tokens", "Tokens of answered prompts.", bridge.prompt_tokens)
        yield _counter("generated_tokens", "Tokens of answers.", bridge.generated_tokens)
        yield _counter("cached_tokens", "Prompt tokens out of a cache.", bridge.cached_tokens)
        yield _gauge("generating", "Prompts that are being answered.", len(bridge.in_flight))
        yield _gauge("weight_version", "Version of the engine's weights.", bridge.weight_version)
        yield _gauge("tasks", "Asyncio tasks of the server's loop.", len(asyncio.all_tasks()))
        if self._behind is not None:
            yield from _of_pool(self._behind)


def _of_pool(behind: Behind) -> Iterator[Metric]:
    pool = behind.pool
    yield _gauge("queue", "Requests that wait for an engine.", pool.waiting)
    for name, text in (
        ("resent", "Requests sent to another engine, because one was gone or busy."),
        ("fenced", "Late answers of dead engines or of older weights, dropped."),
        ("refused", "Requests that found the queue full."),
    ):
        yield _counter(name, text, getattr(pool.stats, name))
    states = GaugeMetricFamily(
        f"{_PREFIX}_worker_state", "1 for the state of each engine.", labels=["worker", "state"]
    )
    busy = GaugeMetricFamily(
        f"{_PREFIX}_worker_requests", "Requests that each engine has.", labels=["worker"]
    )
    versions = GaugeMetricFamily(
        f"{_PREFIX}_worker_weight_version", "Version of its weights.", labels=["worker"]
    )
    failures = CounterMetricFamily(
        f"{_PREFIX}_worker_failures", "Requests that it broke off.", labels=["worker"]
    )
    for worker in list(pool.workers.values()):
        for state in _STATES:
            states.add_metric([worker.url, state], float(worker.state == state))
        busy.add_metric([worker.url], worker.in_flight)
        failures.add_metric([worker.url], worker.failures)
        if worker.weight_version is not None:
            versions.add_metric([worker.url], worker.weight_version)
    yield from (states, busy, versions, failures)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"{_PREFIX}_{name}", text, value=value)


class Counted:
    """ASGI middleware: counts requests, and how long their answers take."""

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self._app, self._figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def told(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        figures = self._figures
        figures.active.inc()
        try:
            await self._app(scope, receive, told)
        finally:
            figures.active.dec()
            # What is passed on as it is meets no route; other paths are of the client's invention.
            passed_on = scope["path"] if scope["path"] in NATIVE else "other"
            route = str(getattr(scope.get("route"), "path", passed_on))
            # A method of the client's own invention is not a label.
            method = scope["method"] if scope["method"] in _METHODS else "other"
            requests, latency = figures.of(route, method, status)
            requests.inc()
            latency.observe(time.perf_counter() - started)


_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"}


def routes(figures: Figures) -> list[BaseRoute]:
    """The route of the figures."""

    async def metrics(request: Request) -> Response:
        return Response(figures.text(), headers={"content-type": _FORMAT})

    return [Route("/metrics", metrics, methods=["GET"])]
