"""The only place with the order of a weight update.

    publish   pause all engines -> give them the weights -> resume
    deliver   files:     send, then engines load; the version before is removed
              meetings:  announce, then send and load side by side; whoever dies in the middle ends
                         the try for all, and the next one is without it
              check      where asked for: what engines hold is what was sent

An engine between `pause` and `resume` makes no token, so no token is ever sampled from half-new
weights, and every token carries the version that it was sampled under. To load weights forgets the
keys and values of older ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from dovetail.transport.meeting import break_off
from dovetail.transport.sender import Sender
from dovetail.types.errors import BrokenUpdateError, EngineError
from dovetail.types.ports import EngineControl
from dovetail.types.weights import Snapshot
from dovetail.weights.check import Holder, check_equal

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

NamedTensors = Iterable[tuple[str, "torch.Tensor"]]

MOST_TRIES = 3
"""Of one update hand to hand."""


async def publish(
    engines: Sequence[EngineControl], version: int, named_tensors: Callable[[], NamedTensors] | None
) -> None:
    """Give every engine the weights of `version`.

    Args:
        engines: all engines of the run.
        version: the trainer's version; one more than the last one published.
        named_tensors: makes a fresh iterator over the weights under their Hugging Face names,
            called once per engine, and again for another try; None when the engines read the
            trainer's own tensors (mode `local`), so that nothing is copied.
    """
    for engine in engines:
        await engine.pause()
    try:
        for engine in engines:
            tensors = _Afresh(named_tensors) if named_tensors else None
            await engine.receive_weights(version, tensors)
    finally:
        for engine in engines:
            await engine.resume()


class Receivers(Protocol):
    """Engines of other processes as one."""

    @property
    def num_receivers(self) -> int:
        """How many the next `load` is for."""
        ...

    async def load(self, snapshot: Snapshot) -> None:
        """Have all of them take these weights.

        Raises:
            BrokenUpdateError: hand to hand, it broke off.
        """
        ...

    def holders(self) -> Sequence[Holder]:
        """Who has them now."""
        ...


async def deliver(
    sender: Sender, engines: Receivers, version: int, tensors: NamedTensors
) -> Snapshot:
    """Carry the weights of `version` to engines that are paused.

    Args:
        tensors: can be iterated over more than once.

    Raises:
        EngineError: they can't be sent, or no engine takes them; WeightMismatchError: one holds
            others than it was sent.
    """
    if sender.meets:
        snapshot = await _meet(sender, engines, version, tensors)
    else:
        snapshot = await asyncio.to_thread(sender.send, version, tensors)
        await engines.load(snapshot)
    if snapshot.digests is not None:
        await check_equal(engines.holders(), version, snapshot.digests)
    await asyncio.to_thread(sender.retire, version)
    return snapshot


async def _meet(
    sender: Sender, engines: Receivers, version: int, tensors: NamedTensors
) -> Snapshot:
    for number in range(1, MOST_TRIES + 1):
        if not engines.num_receivers:
            break
        announced = await asyncio.to_thread(sender.announce, version, engines.num_receivers)
        sending = asyncio.ensure_future(asyncio.to_thread(sender.send, version, tensors))
        loading = asyncio.ensure_future(engines.load(announced))
        try:
            await asyncio.wait([sending, loading], return_when=asyncio.FIRST_EXCEPTION)
            if loading.done() and loading.exception() is not None:
                await _end(announced, str(loading.exception()))
            outcomes = await asyncio.gather(sending, loading, return_exceptions=True)
        except asyncio.CancelledError:
            await _end(announced, "the run is ending")
            loading.cancel()
            await asyncio.gather(sending, loading, return_exceptions=True)
            raise
        failures = [one for one in outcomes if isinstance(one, BaseException)]
        # The trainer's own troubles are its own, and no other try helps.
        for failure in failures:
            if not isinstance(failure, EngineError):
                raise failure
        if not failures:
            return sending.result()
        log.warning("weights of version %d, try %d: %s", version, number, failures[0])
        if number == MOST_TRIES:
            raise failures[0]
    raise EngineError(
        f"no engine is there to be given the weights of version {version}, which are not kept for "
        "later"
    )


async def _end(announced: Snapshot, reason: str) -> None:
    assert announced.meeting is not None, "whoever meets has a meeting"
    await asyncio.to_thread(break_off, announced.meeting, reason)


class _Afresh:
    """Iterates anew each time."""

    def __init__(self, named_tensors: Callable[[], NamedTensors]) -> None:
        self._named_tensors = named_tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._named_tensors())


__all__ = ["BrokenUpdateError", "NamedTensors", "Receivers", "deliver", "publish"]
