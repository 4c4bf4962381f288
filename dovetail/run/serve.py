"""Engines and router without training: a model answers over HTTP until it is told to stop.

    port taken -> model and checkpoint read -> engine -> requests ... -> Ctrl-C or SIGTERM

What can be wrong with the settings or the port is found before the model is read. Engine and server
share one event loop; the engine's steps are on a thread of their own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import uvloop

from dovetail.checkpoint.manager import load_checkpoint
from dovetail.config.resolve import Resolved
from dovetail.observe.log import open_log
from dovetail.router import worker_control
from dovetail.router.bridge import Bridge
from dovetail.router.server import RouterServer
from dovetail.run.embedded import make_serving
from dovetail.run.leaving import end_tasks
from dovetail.run.models import Models
from dovetail.run.steered import SteeredEngine
from dovetail.runtime.compute import compute_thread
from dovetail.runtime.plan import plan
from dovetail.trainers.torch.restore import restore_weights

if TYPE_CHECKING:
    from dovetail.engines.embedded.engine import EmbeddedEngine

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_serve(resolved: Resolved, ready: Callable[[str], None]) -> int:
    """Serve until SIGINT or SIGTERM; the exit code.

    Args:
        ready: called with the address once requests are answered.

    Raises:
        DovetailError: the configuration, the port, the model or the checkpoint is at fault.
    """
    with open_log(None):
        parts = _Parts(resolved)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(parts, ready))
    return 0


class _Parts:
    """One embedded engine of this process, and the server before it. Its port is taken at once."""

    def __init__(self, resolved: Resolved) -> None:
        self.config = resolved.config
        self.plan = plan(self.config.runtime, self.config.model, has_cuda=torch.cuda.is_available())
        self.models = Models(self.config, self.plan)
        self.compute = compute_thread(self.plan.num_threads)
        steered = SteeredEngine(lambda: self.engine, lambda: self.models.model)
        bridge = Bridge(
            lambda: self.engine,
            lambda: self.models.tokenizer,
            model=str(self.config.model.hf_checkpoint),
            limits=lambda: (self.models.context_len, _vocab_size(self.models.model)),
        )
        self.server = RouterServer(
            bridge, self.config.router.router_port, routes=worker_control.routes(steered)
        )

    @cached_property
    def engine(self) -> EmbeddedEngine:
        """With the weights of `load`, if that is set."""
        load = self.config.checkpoint.load
        step = 0
        if load is not None:
            checkpoint = load_checkpoint(load)
            restore_weights(self.models.model, checkpoint.part("policy")[0])
            step = checkpoint.step
        engine = make_serving(self.models, self.compute)
        engine.weight_version = step
        return engine


async def _serve(parts: _Parts, ready: Callable[[str], None]) -> None:
    engine, stop = parts.engine, asyncio.Event()
    await engine.receive_weights(engine.weight_version, None)
    loop = asyncio.get_running_loop()
    for one in _SIGNALS:
        loop.add_signal_handler(one, _leave, one, stop)
    try:
        await parts.server.serve_here()
        ready(parts.server.url)
        await stop.wait()
    finally:
        await parts.server.aclose()
        await engine.close()
        parts.compute.shutdown()
        await end_tasks()


def _leave(signum: int, stop: asyncio.Event) -> None:
    """The first signal ends it in order, the second at once."""
    if stop.is_set():
        os._exit(128 + signum)
    sys.stderr.write(f"\n{signal.Signals(signum).name}: leaving; once more leaves at once\n")
    stop.set()


def _vocab_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
