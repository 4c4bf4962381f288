"""A run's cluster, and what of the run lives on it: trainer ranks, and the processes of engines.

    plan -> cluster -> one place per device -> ranks (run/rank.py) and engines' seats

The process of the run keeps everything else: the loop, data, rewards, the router. It reads no
weights.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.config.leaves import cure
from dovetail.config.router_rules import is_loopback
from dovetail.config.run import RunConfig
from dovetail.hooks import ArgsView
from dovetail.observe.run_dir import RunDir
from dovetail.run.policy import RemotePolicy
from dovetail.run.schedule import Schedule
from dovetail.runtime.plan import Device, Plan
from dovetail.runtime.ray.actor import Stage
from dovetail.runtime.ray.cluster import LOOPBACK, Cluster
from dovetail.runtime.ray.group import TrainerGroup, staged
from dovetail.runtime.ray.placement import Place, Placement
from dovetail.runtime.ray.server import RemoteSeat
from dovetail.runtime.turns import Turns
from dovetail.types.errors import ConfigError, EngineError
from dovetail.types.weights import MEETINGS, Snapshot

if TYPE_CHECKING:
    from dovetail.run.build import Parts


class OnRay:
    """The cluster of one run. Nothing is started before `open`."""

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        self._config, self._plan = config, plan
        seats = {device for engine in plan.engines for device in engine.devices}
        self._devices = sorted(seats | {rank.device for rank in plan.trainer_ranks})
        self._has_gpus = plan.device != "cpu"
        kind = {"GPU": float(len(self._devices))} if self._has_gpus else {}
        self.cluster = Cluster(config.runtime.ray_address, {"CPU": _cpus(self._devices), **kind})
        self._token = secrets.token_urlsafe(32)
        self._placement: Placement | None = None
        self._places: dict[Device, Place] = {}
        self._rank_places: list[Place] = []
        """Where ranks were started last: elsewhere than planned once a node is lost."""
        self._seats: dict[int, RemoteSeat] = {}
        self._logs: Path | None = None

    def open(self) -> None:
        """Start the cluster, or reach it, and take the places; a second call does nothing.

        Raises:
            ConfigError: it can't be reached, or has no room.
            MissingExtraError: Ray is not installed.
        """
        if self._placement is not None:
            return
        nodes = self._nodes()
        self.cluster.start()
        self._placement = Placement(self.cluster, nodes, has_gpus=self._has_gpus)
        self._places = dict(zip(self._devices, self._placement.places, strict=True))
        for engine in range(len(self._plan.engines)):
            self.seat(engine).open()

    def _nodes(self) -> list[int]:
        """Of each device. CPU processes of a cluster of our own are all on this machine."""
        if not self.cluster.is_own:
            return [device.node for device in self._devices]
        asked = self._config.runtime.actor_num_nodes
        if asked > 1 or (self._has_gpus and len(self._plan.nodes) > 1):
            raise ConfigError(
                f"the plan has {len(self._plan.nodes)} nodes, and a cluster of the run's own has "
                f"this machine alone; name one that runs: {cure('ray_address', 'HOST:PORT')}"
            )
        return [0] * len(self._devices)

    def close(self) -> None:
        """Give everything back. A second call does nothing."""
        for seat in self._seats.values():
            seat.close()
        self._seats.clear()
        if self._placement is not None:
            self._placement.close()
            self._placement = None
        self.cluster.close()

    def logs_in(self, run_dir: RunDir) -> None:
        """Where the processes' logs go."""
        self._logs = run_dir.logs

    # Trainer

    def policy(
        self, parts: Parts, schedule: Schedule, check: Callable[[], object]
    ) -> RemotePolicy | None:
        """The trainer's ranks, none started; None where nothing is trained."""
        ranks = self._plan.trainer_ranks
        if not ranks:
            return None

        def job() -> dict[str, Any]:
            return {
                "config": self._config.model_dump(mode="json", exclude_unset=True),
                "passthrough": parts.passthrough,
                "facts": _learned(parts.args, ArgsView(self._config, parts.passthrough)),
                "schedule": dataclasses.asdict(schedule),
                "device": "cuda" if self._has_gpus else "cpu",
                "num_threads": self._threads,
                "world": len(ranks),
                "address": self._address_for_engines(),
            }

        def where() -> tuple[Placement, list[Place]]:
            assert self._placement is not None, "the cluster is open"
            before = self._rank_places or [self._places[rank.device] for rank in ranks]
            nodes = [rank.node for rank in ranks]
            self._rank_places = self._placement.standing(before, nodes)
            return self._placement, self._rank_places

        patience_s = 60 * self._config.trainer.distributed_timeout_minutes
        group = TrainerGroup(where, self._stage, job, check, patience_s)
        runtime, fleet = self._config.runtime, parts.fleet
        self.turns = Turns(
            group if runtime.trainer_rests else None, fleet if runtime.engines_rest else None
        )
        self._group = group
        return RemotePolicy(group, self.turns, fleet, self.open)

    def _address_for_engines(self) -> str | None:
        """Of rank 0, where some engine is on another machine."""
        own = self._rank_places[0].address
        others = {self.host(engine) for engine in range(len(self._plan.engines))}
        return own if others - {own} else None

    def weights(self) -> RankWeights:
        """What carries weights from the ranks to the engines."""
        return RankWeights(
            self._group,
            self.turns,
            meets=self._config.engine.weight_transport in MEETINGS,
        )

    # Engines

    def seat(self, engine: int) -> RemoteSeat:
        """Where an engine lives; the cluster is open."""
        assert self._placement is not None, "the cluster is open"
        if engine not in self._seats:
            places = [self._places[one] for one in self._plan.engines[engine].devices]
            self._seats[engine] = RemoteSeat(
                self._placement, places, self._stage(f"engine {engine} seat")
            )
        return self._seats[engine]

    def host(self, engine: int) -> str:
        """The address that an engine listens on."""
        if self._placement is None:
            return LOOPBACK
        return self._places[self._plan.engines[engine].devices[0]].address

    def token(self, engine: int) -> str | None:
        """What an engine asks of who speaks to it, where other machines can: made for this run,
        and kept in memory alone."""
        return None if is_loopback(self.host(engine)) else self._token

    # What every process needs

    @property
    def _threads(self) -> int:
        here = len({rank.device for rank in self._plan.trainer_ranks if rank.node == 0})
        return max(1, self._plan.num_threads // max(1, here))

    def _stage(self, name: str) -> Stage:
        assert self._logs is not None, "the run directory is made before anything is started"
        env = {"OMP_NUM_THREADS": str(self._threads)}
        if self.cluster.is_own:
            env["GLOO_SOCKET_IFNAME"] = "lo"
        base = Stage("", "", tuple(sys.path), os.getcwd(), env)
        return staged(base, self._logs)(name)


class RankWeights:
    """A `transport.sender.Sender`: rank 0 sends, while all gather."""

    def __init__(self, group: TrainerGroup, turns: Turns, *, meets: bool) -> None:
        self._group, self._turns, self.meets = group, turns, meets

    def announce(self, version: int, num_engines: int) -> Snapshot:
        """As `Sender.announce`; from here on trainer and engines both work."""
        self._turns.both_work()
        snapshot: Snapshot = self._group.announce(version, num_engines)
        return snapshot

    def send(self, version: int, tensors: Iterable[Any]) -> Snapshot:
        """The weights of the ranks now; `tensors` are not looked at. Then it is the engines'
        turn."""
        if not self.meets:
            self._turns.trainer_works()
        sent = self._group.publish(version)
        if isinstance(sent, EngineError):
            raise sent
        self._turns.engines_work()
        snapshot: Snapshot = sent
        return snapshot

    def retire(self, before: int) -> None:
        """As `SnapshotStore.retire`."""
        self._group.retire(before)

    def close(self) -> None:
        """The ranks remove what they wrote."""


def _cpus(devices: list[Device]) -> float:
    """For a cluster of the run's own: at least one for each process, whatever the machine has."""
    return float(max(2 * len(devices), os.cpu_count() or 1))


def _learned(args: ArgsView, fresh: ArgsView) -> dict[str, Any]:
    """Plain facts that became known since `args` was made."""
    before = vars(fresh)
    return {
        name: value
        for name, value in vars(args).items()
        if (name not in before or before[name] != value)
        and isinstance(value, str | int | float | bool | list | None)
    }
