"""An aiohttp application on a thread of its own, beside whatever the process does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from aiohttp.web_log import AccessLogger

_START_S = 30.0
_FAREWELL_S = 5.0


class FilteredAccessLogger(AccessLogger):
    """Logs requests that failed, and nothing of those that did not."""

    def log(self, request: Any, response: Any, time: float) -> None:
        """Called after each request."""
        if response.status >= 400:
            super().log(request, response, time)


class AppHandle:
    """A running application."""

    def __init__(self, name: str) -> None:
        self.port = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.error: BaseException | None = None
        self._ready = threading.Event()
        self._runner: web.AppRunner | None = None
        self._start: tuple[Any, ...] = ()

    def start(self, app: web.Application, host: str, port: int, options: Mapping[str, Any]) -> None:
        """Serve, and return when the port is open.

        Raises:
            OSError: the port is taken.
            TimeoutError: it did not start in time.
        """
        self._start = (app, host, port, options)
        self.thread.start()
        if not self._ready.wait(_START_S):
            raise TimeoutError(f"{self.thread.name} did not start within {_START_S:g} s")
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the server and its thread; a second call does nothing."""
        if self.loop.is_running():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(_FAREWELL_S)

    close = stop

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._serve())
        # Told to whoever waits for the start.
        except BaseException as error:
            self.error = error
            self._ready.set()
            return
        self._ready.set()
        self.loop.run_forever()
        if self._runner is not None:
            self.loop.run_until_complete(self._runner.cleanup())
        self.loop.close()

    async def _serve(self) -> None:
        app, host, port, options = self._start
        self._runner = web.AppRunner(app, **options)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.port = int(self._runner.addresses[0][1])


def run_app_in_thread(
    app: web.Application,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    thread_name: str = "aiohttp-app",
    runner_kwargs: Mapping[str, Any] | None = None,
) -> AppHandle:
    """Serve `app` on a daemon thread; port 0 takes a free one, which is the handle's `port`.

    Raises:
        OSError: the port is taken.
    """
    handle = AppHandle(thread_name)
    handle.start(app, host, port, dict(runner_kwargs or {}))
    return handle
