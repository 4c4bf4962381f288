"""The embedded engine of `dovetail serve`, steered over HTTP (`router.worker_control`)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dovetail.checkpoint.hf_names import named_tensors
from dovetail.run.taken import KEEPS, Reading, Taken
from dovetail.transport.tensor_files import tensor_digest
from dovetail.types import EngineError, ScoreRequest
from dovetail.types.weights import Meeting

if TYPE_CHECKING:
    from dovetail.engines.embedded.engine import EmbeddedEngine

_PROBE_S = 20.0


class SteeredEngine:
    """Implements `router.worker_control.Steered`, on the loop that the engine is on.

    Args:
        engine: gives the engine, once it is there.
        model: gives the model whose tensors it reads.
        before_reading: the user's function that is told of each directory and version before
            anything of it is read.
    """

    def __init__(
        self,
        engine: Callable[[], EmbeddedEngine],
        model: Callable[[], Any],
        before_reading: Callable[[str, int | None], object] | None = None,
    ) -> None:
        self._get_engine, self._get_model = engine, model
        self._paused = self._asleep = False
        self._turn = asyncio.Lock()
        """One change of weights after another."""
        self._snapshot: dict[str, torch.Tensor] | None = None
        self._probes = itertools.count()
        self._reading = Reading(model)
        self._before_reading = before_reading

    @property
    def _engine(self) -> EmbeddedEngine:
        return self._get_engine()

    @property
    def weight_version(self) -> int:
        """The engine's."""
        return self._engine.weight_version

    async def abort(self) -> None:
        """End every request, also in a pause."""
        await self._engine.abort()

    async def pause(self) -> None:
        """Hold every request."""
        self._paused = True
        await self._engine.pause()

    async def resume(self) -> None:
        """Go on; without memory, as soon as that is back."""
        self._paused = False
        await self._go_on()

    async def load_weights(self, directory: Path, version: int | None) -> int:
        """Read and check everything first, while requests go on; then copy it in a pause.

        Raises:
            CheckpointError: the directory does not have this model's weights, whole.
            EngineError: they are not those that the run wrote there.
        """
        async with self._turn:
            if self._before_reading is not None:
                await asyncio.to_thread(self._before_reading, str(directory), version)
            tensors = await asyncio.to_thread(self._reading.begin, directory)
            try:
                waiting = self._engine.num_open
                new = self._engine.weight_version + 1 if version is None else version
                await self._engine.receive_weights(new, tensors.items())
                self._reading.taken()
            finally:
                self._reading.end()
            return waiting

    async def meet(self, meeting: Meeting, version: int) -> None:
        """Take the weights as they come, in a pause.

        Raises:
            BrokenUpdateError: it broke off; requests are refused until weights came whole.
            CheckpointError: they are another model's; the old ones are as they were.
        """
        async with self._turn:
            self._reading.forget()
            taking = Taken(self._get_model(), KEEPS)
            await self._engine.pause()
            try:
                tensors = await asyncio.to_thread(taking.take, meeting)
            except Exception as error:
                if taking.began:
                    self._engine.spoil(f"an update to version {version} broke off: {error}")
                await self._go_on()
                raise
            await self._engine.receive_weights(version, tensors)
            await self._go_on()

    async def set_weight_version(self, version: int) -> None:
        """The weights are those of `version`."""
        async with self._turn:
            await self._engine.receive_weights(version, None)

    async def release_memory(self, tags: tuple[str, ...]) -> None:
        """Of `kv_cache`. The weights stay: on a CPU there is no other place for them."""
        if "kv_cache" in tags and not self._asleep:
            self._asleep = True
            await self._engine.sleep()

    async def resume_memory(self, tags: tuple[str, ...]) -> None:
        """As it was before `release_memory`; what was not paused goes on."""
        if "kv_cache" in tags and self._asleep:
            self._asleep = False
            self._engine.wake()
            await self._go_on()

    async def _go_on(self) -> None:
        if not self._paused and not self._asleep:
            await self._engine.resume()

    async def check_weights(self, action: str, skip: tuple[str, ...]) -> dict[str, str]:
        """Sums of all tensors; or keep a copy, overwrite the weights, compare with the copy.

        Raises:
            EngineError: there is no copy, or the weights differ from it.
        """
        async with self._turn:
            if action == "checksum":
                return await asyncio.to_thread(_sums, self._get_model(), skip)
            own = {
                name: tensor
                for name, tensor in self._get_model().named_parameters()
                if not any(part in name for part in skip)
            }
            if action == "snapshot":
                self._snapshot = {name: tensor.detach().clone() for name, tensor in own.items()}
            elif action == "reset_tensors":
                self._reading.forget()
                noise = [(name, torch.randn_like(tensor)) for name, tensor in own.items()]
                await self._engine.receive_weights(self.weight_version, noise)
            else:
                self._compare(own)
            return {}

    def _compare(self, own: dict[str, Any]) -> None:
        if self._snapshot is None:
            raise EngineError("there is no snapshot to compare with; send action snapshot first")
        differ = [
            name
            for name, tensor in own.items()
            if name in self._snapshot and not torch.equal(self._snapshot[name], tensor)
        ]
        if differ:
            raise EngineError(
                f"{len(differ)} tensors differ from the snapshot, e.g. {', '.join(differ[:3])}"
            )

    async def probe(self) -> None:
        """A forward of two tokens, unless requests are under way or everything is paused. None is
        drawn: what is drawn for requests without a seed goes by how many there were.

        Raises:
            EngineError: it failed, or took too long.
        """
        if self._engine.num_open or self._paused or self._asleep:
            return
        request = ScoreRequest(f"health#{next(self._probes)}", (0, 0))
        try:
            await asyncio.wait_for(self._engine.score(request), _PROBE_S)
        except TimeoutError as error:
            raise EngineError(f"no forward within {_PROBE_S:.0f} s") from error


@torch.no_grad()
def _sums(model: Any, skip: tuple[str, ...]) -> dict[str, str]:
    """Of the bytes of each, under the names of Hugging Face files."""
    return {
        name: tensor_digest(tensor)
        for name, tensor in named_tensors(model)
        if not any(part in name for part in skip)
    }
