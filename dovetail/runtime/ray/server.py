"""An engine's process on whichever node of the cluster: an actor there holds it, and what the
fleet asks of a process of its own it asks of this one.

    RemoteServer (the run) --calls--> actor: EngineSeat --> ServerProcess -> keeper -> server

The keeper ends the server when its actor is gone, and the actor is gone when the run is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail.engines.process import HeldPort, ServerProcess, wait_until_ready
from dovetail.runtime.ray.actor import Answer, Holder, Stage
from dovetail.runtime.ray.placement import Place, Placement
from dovetail.types.errors import EngineError

MAKER = "dovetail.runtime.ray.server:EngineSeat"
LOOK = "dovetail.runtime.ray.server:Look"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = 4
"""Calls at once of an engine's actor: one waits for the end of the process."""
_LOOK_EVERY_S = 0.05
_ASK_S = 10.0
_START_S = 60.0
_GPU_SHARE = 0.4
"""Of a GPU: a rank may have the other half."""


class EngineSeat:
    """Lives in the actor: a port of the node, and the process that is to listen there."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._port: HeldPort | None = None
        self._process: ServerProcess | None = None

    def reserve(self, number: int) -> int:
        """Hold a port of this node; 0: any."""
        self._port = HeldPort(self._address, number)
        return self._port.number

    def start(self, argv: list[str], env: dict[str, str], log_file: str, name: str) -> None:
        """Start the process.

        Raises:
            EngineError: it can't be started.
        """
        process = ServerProcess(argv, log_file=Path(log_file), name=name, env=env)
        process.start()
        self._process = process

    def ended(self) -> str:
        """How it ended, once it has."""
        process = self._process
        while process is not None and process.alive:
            time.sleep(_LOOK_EVERY_S)
        return "it was never started" if process is None else process.ending

    def facts(self) -> dict[str, Any]:
        """What can be seen of it."""
        process = self._process
        if process is None:
            return {"pids": [], "stopped": False, "log_tail": "(it was never started)"}
        return {
            "pids": process.pids,
            "stopped": process.stopped,
            "log_tail": process.log_tail,
        }

    def terminate(self, grace_s: float) -> None:
        """End it."""
        if self._process is not None:
            asyncio.run(self._process.terminate(grace_s))

    def gpus(self) -> list[str]:
        """What the node calls the GPUs of this actor."""
        return gpus_here()


class Look:
    """Lives in an actor at a further place of an engine, just long enough to be asked."""

    def gpus(self) -> list[str]:
        """As `EngineSeat.gpus`."""
        return gpus_here()


def gpus_here() -> list[str]:
    """What the node calls the GPUs of this process: numbers or UUIDs."""
    import ray

    return [str(one) for one in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]


class RemoteServer:
    """Satisfies what `runtime/health.py` needs of a `ServerProcess`.

    Args:
        seat: starts the actor, and gives it.
        command: program and arguments.
        env: variables beside those of the actor.
        log_file: what it prints is added there, on its node.
        name: what messages call it.
    """

    def __init__(
        self,
        seat: RemoteSeat,
        command: Sequence[str],
        *,
        log_file: Path,
        name: str,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.command, self.log_file, self.name = tuple(command), log_file, name
        self._seat, self._env = seat, dict(env or {})
        self._end: Any = None
        self._ending: str | None = None

    def start(self) -> None:
        """Start the process, anew if it has ended, and its actor if that is gone.

        Raises:
            EngineError: it can't be started.
        """
        self._seat.hold()
        env = {**self._env, **self._seat.devices()}
        given = (list(self.command), env, str(self.log_file.absolute()), self.name)
        self._seat.ask("start", *given)
        self._ending, self._end = None, self._seat.begin("ended")

    @property
    def alive(self) -> bool:
        """Whether it runs, be it stopped."""
        import ray

        if self._end is None or self._ending is not None:
            return False
        done, _ = ray.wait([self._end], timeout=0)
        if not done:
            return True
        try:
            answer: Answer = ray.get(self._end)
            self._ending = str(answer.value)
        except ray.exceptions.RayError:
            self._ending = "its actor on the cluster is gone"
            self._seat.drop()
        return False

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        return self._ending or "it runs"

    @property
    def pids(self) -> list[int]:
        """Of the server and of every process below it, on its node."""
        return list(self._facts("pids", []))

    @property
    def stopped(self) -> bool:
        """Whether one of its processes stands still (SIGSTOP)."""
        return bool(self._facts("stopped", False))

    @property
    def log_tail(self) -> str:
        """The last lines that it printed since its start."""
        return str(self._facts("log_tail", "(its node can't be asked for the log)"))

    @property
    def end_of_log(self) -> str:
        """`log_tail` and where it is from, for a message."""
        tail = "\n  ".join(self.log_tail.splitlines())
        return f"the end of its log {self.log_file}:\n  {tail}"

    def _facts(self, name: str, otherwise: Any) -> Any:
        try:
            return self._seat.ask("facts")[name]
        except EngineError:
            return otherwise

    async def wait_ready(self, probe: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """As `ServerProcess.wait_ready`."""
        await wait_until_ready(self, probe, timeout_s)

    async def terminate(self, grace_s: float = 0.0) -> None:
        """Ask it to end, and kill what is left of it after `grace_s` seconds."""
        try:
            await asyncio.to_thread(
                self._seat.ask, "terminate", grace_s, timeout_s=grace_s + _ASK_S
            )
        except EngineError:
            # With its actor the keeper, and with that the server, go at once.
            self._seat.kill()
        self._ending = self._ending or "it was ended"

    def kill(self) -> None:
        """Kill it, with its actor."""
        self._seat.kill()
        self._ending = self._ending or "it was killed"


class RemoteSeat:
    """Implements `runtime.fleet.Home` on a place of the cluster; the actor comes with the first
    need of it.

    Args:
        placement: where there are places.
        places: those of this engine, one for each of its devices, all on one node; its actor is
            at the first.
        stage: what its actor needs.
    """

    def __init__(self, placement: Placement, places: Sequence[Place], stage: Stage) -> None:
        self._placement, self._places, self._stage = placement, places, stage
        self.place = places[0]
        self._devices: dict[str, str] | None = None
        self._actor: Any = None
        self.number = 0

    @property
    def url(self) -> str:
        """Where the engine will listen."""
        return f"http://{self.place.address}:{self.number}"

    def open(self) -> None:
        """Start the actor, without waiting for it."""
        if self._actor is None:
            self._actor = self._at(self.place, MAKER, {"address": self.place.address})

    def _at(self, place: Place, maker: str, given: Mapping[str, Any]) -> Any:
        made = self._placement.actor(Holder, place, threads=_THREADS, gpus=_GPU_SHARE)
        return made.remote(self._stage, maker, dict(given))

    def devices(self) -> dict[str, str]:
        """The variable by which a server sees all GPUs of its engine; of one GPU, or none, its
        actor's own will do. Asked once: bundles stay on their GPUs.

        Raises:
            EngineError: they can't be had.
        """
        if len(self._places) == 1 or not self._placement.has_gpus:
            return {}
        if self._devices is None:
            found = list(self.ask("gpus", timeout_s=_START_S))
            for place in self._places[1:]:
                found += self._look(place)
            if len(set(found)) != len(self._places):
                raise EngineError(
                    f"{self._stage.name}: got GPUs {found} of its node, expected "
                    f"{len(self._places)} different ones"
                )
            self._devices = {_VISIBLE: ",".join(found)}
        return self._devices

    def _look(self, place: Place) -> list[str]:
        import ray

        actor = self._at(place, LOOK, {})
        try:
            answer: Answer = ray.get(actor.call.remote("gpus"), timeout=_START_S)
        except ray.exceptions.RayError as error:
            raise EngineError(f"{self._stage.name}: a GPU of its can't be had: {error}") from error
        finally:
            ray.kill(actor, no_restart=True)
        if not answer.good:
            raise EngineError(f"{self._stage.name}: {answer.error or answer.failure}")
        return list(answer.value)

    def hold(self) -> None:
        """Have the actor hold the port; the same one again when the actor is a new one.

        Raises:
            EngineError: it can't.
        """
        if self._actor is None or self.number == 0:
            self.open()
            self.number = self.ask("reserve", self.number, timeout_s=_START_S)

    def reserve(self) -> RemoteSeat:
        """As `Home.reserve`."""
        self.hold()
        return self

    def server(
        self, command: Sequence[str], *, log_file: Path, name: str, env: Mapping[str, str]
    ) -> RemoteServer:
        """As `Home.server`."""
        return RemoteServer(self, command, log_file=log_file, name=name, env=env)

    def begin(self, name: str, *given: Any) -> Any:
        """Call the actor without waiting."""
        if self._actor is None:
            raise EngineError(f"{self._stage.name}: its actor on the cluster is gone")
        return self._actor.call.remote(name, *given)

    def ask(self, name: str, *given: Any, timeout_s: float = _ASK_S) -> Any:
        """What the actor answers; the calling thread waits, so it must not be an event loop's.

        Raises:
            EngineError: it is gone, does not answer in time, or could not do it.
        """
        import ray

        asked = self._actor
        try:
            answer: Answer = ray.get(self.begin(name, *given), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise EngineError(f"{self._stage.name}: no answer in {timeout_s:.0f} s") from error
        except ray.exceptions.RayError as error:
            # Another thread may have started the next one meanwhile.
            if self._actor is asked:
                self.drop()
            raise EngineError(f"{self._stage.name}: its actor is gone: {error}") from error
        if not answer.good:
            raise EngineError(str(answer.error or answer.failure))
        return answer.value

    def drop(self) -> None:
        """The actor is gone."""
        self._actor = None

    def kill(self) -> None:
        """Kill the actor, and with it what it holds."""
        import ray

        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)
            self.drop()

    def close(self) -> None:
        """As `HeldPort.close`: give the place back."""
        self.kill()
