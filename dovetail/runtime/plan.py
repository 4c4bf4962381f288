"""Placement: a pure function from the configuration and what machines there are to who gets which
devices, printable before a run.

    colocated        node 0 | trainer 0  trainer 1 |   the same devices, in turns
                            | engine 0   engine 1  |
    disaggregated    node 0 | trainer 0  trainer 1 | engine 0  engine 1 |

Trainers, engines and user code never see the mode; only `run/` reads the plan. A device is
a GPU, or on a machine without GPUs a process on its CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from dovetail.config.engine_count import num_engines
from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig
from dovetail.runtime.fit import check_fit
from dovetail.runtime.layout import ALONE, Coordinates, Layout, layout
from dovetail.runtime.shape import ModelShape
from dovetail.types.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class Device:
    """One GPU, or one CPU process where there are none."""

    node: int
    """Which of the cluster's nodes, from 0."""
    index: int
    """Which of the node's devices, from 0."""


@dataclass(frozen=True, slots=True)
class TrainerRank:
    """One process of the trainer."""

    rank: int
    device: Device
    coordinates: Coordinates

    @property
    def node(self) -> int:
        """The node that it lives on."""
        return self.device.node


@dataclass(frozen=True, slots=True)
class PlannedEngine:
    """One engine that the run starts."""

    index: int
    devices: tuple[Device, ...]
    """All on one node; several are tensor parallel."""
    shares_tensors: bool = False
    """True: it lives in the trainer's process and reads the parameters that the trainer updates."""

    @property
    def node(self) -> int:
        """The node that it lives on."""
        return self.devices[0].node


@dataclass(frozen=True, slots=True)
class Cluster:
    """What there is to place roles on."""

    has_cuda: bool = False
    gpus: tuple[int, ...] | None = None
    """Devices of each node; None: nodes are as many, and have as many devices, as are asked for
    (CPU processes, or a cluster that was not looked at)."""
    num_nodes: int | None = None
    """Nodes of a cluster of CPU processes; None: as many as are asked for."""
    memory_bytes: int | None = None
    """Memory of one GPU, or of a machine without GPUs, where it is known."""


@dataclass(frozen=True)
class Plan:
    """Where each role lives."""

    mode: str
    device: str
    """Mode local: `cpu`, or `cuda:0` shared by trainer and engine. Else `cpu` or `cuda`: what a
    rank's device is called in its own process, where it sees no other."""
    num_threads: int
    """CPU threads for tensor work of one machine."""
    shares_tensors: bool
    """True: engine and trainer are in one process and read the same parameters, so that publishing
    copies nothing; but for `has_copy`."""
    has_copy: bool = False
    """True: the engine of this process has a copy of them, and generates while they change."""
    layout: Layout = ALONE
    nodes: tuple[int, ...] = (1,)
    """Devices of each node that is used."""
    trainer_ranks: tuple[TrainerRank, ...] = ()
    """By rank; empty where nothing is trained."""
    engines: tuple[PlannedEngine, ...] = ()
    """By index; those that run already are no part of the plan."""

    def describe(self) -> str:
        """One line for a person."""
        if self.mode == "local":
            where = f"{self.device}, {self.num_threads} threads"
            if self.has_copy:
                return f"local: one process on {where}, the engine on a copy of the weights"
            if self.shares_tensors:
                return f"local: one process on {where}, engine and trainer share their tensors"
            return f"local: trainer on {where}; engines in other processes, with own tensors"
        kind = "GPUs" if self.device != "cpu" else "CPU processes"
        places = f"{_count(len(self.nodes), 'node')} of {_each(self.nodes)} {kind}"
        split = self.layout.describe()
        trainer = _count(len(self.trainer_ranks), "trainer rank") + (f" ({split})" if split else "")
        engines = _count(len(self.engines), "engine") if self.engines else "no engine of its own"
        if self.engines and len(self.engines[0].devices) > 1:
            engines += f" of {len(self.engines[0].devices)} each"
        turns = ", in turns on the same devices" if self.mode == "colocated" else ""
        return f"{self.mode}: {places}; {trainer}, {engines}{turns}"


def plan(config: RunConfig, cluster: Cluster, shape: ModelShape | None = None) -> Plan:
    """Place every role.

    Args:
        config: a configuration that `dovetail.config.check` let pass.
        cluster: the machines.
        shape: of the model, where it is known before it loads; see `shape_of`.

    Raises:
        ConfigError: there are too few devices, a GPU is asked for where there is none, or the model
        can't be split as asked.
    """
    device, threads = _device(config, cluster), _threads(config)
    if config.runtime.mode == "local":
        return _local(config, device, threads)
    if shape is not None:
        check_fit(config, shape)
    split = layout(config)
    nodes = _nodes(config, cluster)
    _check_nodes(config, nodes, cluster)
    ranks = tuple(
        TrainerRank(rank, place, split.at(rank))
        for rank, place in enumerate(_trainer_devices(config, nodes))
    )
    return Plan(
        mode=config.runtime.mode,
        device=device.partition(":")[0],
        num_threads=threads,
        shares_tensors=False,
        layout=split,
        nodes=nodes,
        trainer_ranks=ranks,
        engines=_engines(config, nodes, [one.device for one in ranks]),
    )


def serving_plan(config: RunConfig, cluster: Cluster) -> Plan:
    """Of engines without a trainer, all on this machine, whatever the mode of training is.

    Raises:
        ConfigError: a GPU is asked for where there is none.
    """
    return _local(config, _device(config, cluster), _threads(config))


def _device(config: RunConfig, cluster: Cluster) -> str:
    if config.model.device == "cuda" and not cluster.has_cuda:
        raise ConfigError(
            "device 'cuda' was asked for, but torch sees no GPU; "
            "use --device auto or --device cpu (TOML: model.device)"
        )
    return "cuda:0" if cluster.has_cuda and config.model.device != "cpu" else "cpu"


def _threads(config: RunConfig) -> int:
    return config.model.num_threads or len(os.sched_getaffinity(0))


def _local(config: RunConfig, device: str, threads: int) -> Plan:
    here, apart = Device(0, 0), config.engine.in_processes
    # On a GPU what trains and what decodes at the same time would wait for each other's kernels.
    apart = apart or (config.collects_ahead and device != "cpu")
    return Plan(
        mode="local",
        device=device,
        num_threads=threads,
        shares_tensors=not apart,
        has_copy=not apart and config.collects_ahead,
        trainer_ranks=(TrainerRank(0, here, Coordinates()),),
        engines=tuple(
            PlannedEngine(index, (here,), shares_tensors=not apart)
            for index in range(num_engines(config))
        ),
    )


def _nodes(config: RunConfig, cluster: Cluster) -> tuple[int, ...]:
    """Devices of each node that may be used; made up where nobody looked."""
    runtime = config.runtime
    if cluster.gpus is not None:
        limit = runtime.num_gpus_per_node
        return tuple(count if limit is None else min(count, limit) for count in cluster.gpus)
    per_engine, engines = runtime.rollout_num_gpus_per_engine, num_engines(config)
    if runtime.mode == "colocated":
        size = runtime.num_gpus_per_node or runtime.actor_num_gpus_per_node
        return (size,) * runtime.actor_num_nodes
    size = runtime.num_gpus_per_node or max(runtime.actor_num_gpus_per_node, per_engine)
    beside = (size - runtime.actor_num_gpus_per_node) // per_engine * runtime.actor_num_nodes
    more = -(-max(0, engines - beside) // max(1, size // per_engine))
    return (size,) * (runtime.actor_num_nodes + more)


def _check_nodes(config: RunConfig, nodes: tuple[int, ...], cluster: Cluster) -> None:
    if cluster.num_nodes is not None and len(nodes) > cluster.num_nodes:
        raise ConfigError(
            f"the plan asks for {_count(len(nodes), 'node')}, the Ray cluster at "
            f"{config.runtime.ray_address} has {cluster.num_nodes}; lower "
            f"{cure('actor_num_nodes')} or {cure('rollout_num_engines')}, or raise "
            f"{cure('num_gpus_per_node')}, or start more (`ray start --address=...`)"
        )


def _trainer_devices(config: RunConfig, nodes: tuple[int, ...]) -> list[Device]:
    """The first devices of the first nodes that have as many as each is to give."""
    runtime = config.runtime
    each = runtime.actor_num_gpus_per_node
    fitting = [node for node, count in enumerate(nodes) if count >= each]
    if len(fitting) < runtime.actor_num_nodes:
        raise ConfigError(
            f"the trainer is to have {_count(runtime.actor_num_nodes, 'node')} of {each} devices, "
            f"there are {len(fitting)} with as many (devices of each node: {_listed(nodes)}); "
            f"lower {cure('actor_num_nodes')} or {cure('actor_num_gpus_per_node')}"
        )
    return [
        Device(node, index) for node in fitting[: runtime.actor_num_nodes] for index in range(each)
    ]


def _engines(
    config: RunConfig, nodes: tuple[int, ...], trainer: list[Device]
) -> tuple[PlannedEngine, ...]:
    """Each takes the first devices that are next to each other on a node: the trainer's own
    (colocated), or what the trainer leaves."""
    size, wanted = config.runtime.rollout_num_gpus_per_engine, num_engines(config)
    taken = set(trainer)
    pools = [[Device(node, index) for index in range(count)] for node, count in enumerate(nodes)]
    colocated = config.runtime.mode == "colocated"
    pools = [[one for one in pool if (one in taken) == colocated] for pool in pools]
    seats = [
        tuple(pool[first : first + size])
        for pool in pools
        for first in range(0, len(pool) - size + 1, size)
    ]
    if len(seats) < wanted:
        whose = "the trainer has" if colocated else "the trainer leaves"
        raise ConfigError(
            f"{wanted} engines of {size} devices each do not fit: {whose} "
            f"{sum(map(len, pools))} devices (of each node: {_listed(list(map(len, pools)))}), "
            f"and an engine stays on one node; lower {cure('rollout_num_gpus')} or "
            f"{cure('rollout_num_gpus_per_engine')}"
        )
    return tuple(PlannedEngine(index, seats[index]) for index in range(wanted))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _each(counts: tuple[int, ...]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else "/".join(map(str, counts))


def _listed(counts: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, counts)) or "none"
