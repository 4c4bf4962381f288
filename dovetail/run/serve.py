"""Engines and router without training: a model answers over HTTP until it is told to stop.

    settings, port -> model and checkpoint -> engines -> requests ... -> Ctrl-C or SIGTERM

What can be wrong with the settings or the port is found before the model is read. An engine of this
process shares one event loop with the server, and has a thread for its steps; engines of other
processes are a fleet, with the server on the fleet's loop.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import uvloop

from dovetail.config.resolve import Resolved
from dovetail.observe.log import open_log
from dovetail.observe.run_dir import RunDir
from dovetail.run.heap import settled_heap, unswept_heap
from dovetail.run.interrupt import Wish
from dovetail.run.join import Membership
from dovetail.run.leaving import end_tasks
from dovetail.run.served import ServedParts
from dovetail.weights.publish import publish

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Say = Callable[[str], None]


def run_serve(resolved: Resolved, ready: Say, say: Say) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        ready: called with the address once requests are answered.
        say: called with what is being done, where that takes long.

    Raises:
        DovetailError: the configuration, the port, the model, the checkpoint or an engine is at
            fault.
    """
    with open_log(None):
        with unswept_heap():
            parts = ServedParts(resolved)
            _ = parts.models.model, parts.step
            if parts.fleet is None:
                _ = parts.engine
        with settled_heap(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(parts, ready, say))


async def _serve(parts: ServedParts, ready: Say, say: Say) -> None:
    stop, wish = asyncio.Event(), Wish()
    for one in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(one, _leave, wish, one, stop)
    member = Membership(parts.config, parts.server.url)
    starting = asyncio.ensure_future(_start(parts, say))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            await starting
            ready(parts.server.url)
            starting = asyncio.ensure_future(_join(member, say, stop))
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
            await stopping
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        if (unsaid := await member.leave()) is not None:
            say(f"the run was not told that this engine leaves: {unsaid}")
        await _end(parts)
        await end_tasks()


async def _start(parts: ServedParts, say: Say) -> None:
    fleet, config = parts.fleet, parts.config
    if fleet is None:
        await parts.engine.receive_weights(parts.step, None)
        await parts.server.serve_here()
        return
    logs = RunDir.create(f"{config.observe.run_name}-serve", config.observe.run_dir).engines
    await fleet.start(logs, say)
    if config.checkpoint.load is not None:
        await publish([fleet.engine], parts.step, parts.weights)
    await asyncio.to_thread(parts.server.serve_on, fleet.thread.loop)


async def _join(member: Membership, say: Say, stop: asyncio.Event) -> None:
    if not member.of:
        await stop.wait()
        return
    say(f"joining the run at {member.of}")
    await member.enter()
    say("joined: it has the weights of the run, and gets requests")


async def _end(parts: ServedParts) -> None:
    if parts.fleet is None:
        await parts.server.aclose()
        await parts.engine.close()
    else:
        await asyncio.to_thread(parts.server.close)
        await parts.fleet.engine.close()
    parts.compute.shutdown()


def _leave(wish: Wish, signum: int, stop: asyncio.Event) -> None:
    if wish.is_first(signum, "leaving"):
        stop.set()
