"""Places on a Ray cluster: one bundle per device of the run, found once, in the order of nodes.

On a machine without GPUs a device is a CPU process and takes a sliver of a CPU: the system shares
out what it has, so that two cores suffice for any number of ranks and engines in tests.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dovetail.runtime.ray.cluster import LOOPBACK, Cluster
from dovetail.types.errors import ConfigError, TrainError

SLIVER = 0.01
"""Of a CPU: what a process of ours asks for where it does not compute on GPUs."""
_PATIENCE_S = 60.0
_NODE_LABEL = "ray.io/node-id"


@dataclass(frozen=True, slots=True)
class Place:
    """One device of the run."""

    bundle: int
    node: str
    """Ray's id of the node."""
    address: str
    """Of the node."""
    group: int = 0
    """The placement group that has the bundle; later ones are of nodes that stand in for others."""


class Placement:
    """A placement group with one bundle per device, and groups for what had to move since.

    Args:
        nodes: for each device, which node of the plan it is on; several may be on one.
        has_gpus: each device is a GPU; else a CPU process.

    Raises:
        ConfigError: the cluster has too few nodes, or too little is free on them.
    """

    def __init__(self, cluster: Cluster, nodes: Sequence[int], *, has_gpus: bool) -> None:
        self._cluster, self.has_gpus = cluster, has_gpus
        found = _nodes(cluster, nodes, has_gpus)
        self._groups: dict[int, Any] = {}
        self._next = 0
        pinned = [{_NODE_LABEL: found[node]["NodeID"]} for node in nodes]
        if self._take(len(nodes), {"bundle_label_selector": pinned}) is None:
            raise ConfigError(
                f"the Ray cluster has no room for {len(nodes)} "
                f"{'GPUs' if has_gpus else 'processes'}: within {_PATIENCE_S:.0f} s it has "
                f"{_resources(cluster)}. Ask for fewer ranks or engines, or end what else runs "
                "there"
            )
        self.places = self._addressed(
            [Place(bundle, found[node]["NodeID"], "") for bundle, node in enumerate(nodes)]
        )

    def _take(self, count: int, how: Mapping[str, Any]) -> int | None:
        """So many bundles, as a group of its own: its number; None: there is no room."""
        from ray.util.placement_group import placement_group, remove_placement_group

        bundle = {"CPU": 1.0, "GPU": 1.0} if self.has_gpus else {"CPU": SLIVER * 4}
        group = placement_group([dict(bundle) for _ in range(count)], **how)
        if not group.wait(timeout_seconds=_PATIENCE_S):
            remove_placement_group(group)
            return None
        number, self._next = self._next, self._next + 1
        self._groups[number] = group
        return number

    def _addressed(self, places: Sequence[Place]) -> list[Place]:
        """What stays on this machine needs to be heard by nobody else."""
        of = {one["NodeID"]: str(one["NodeManagerAddress"]) for one in self._cluster.nodes}
        alone = {of[one.node] for one in places} == {self._cluster.own_address}
        return [replace(one, address=LOOPBACK if alone else of[one.node]) for one in places]

    def standing(self, places: Sequence[Place], together: Sequence[Hashable]) -> list[Place]:
        """These places, and new ones for those whose nodes are gone.

        Args:
            together: for each place a name; places of one name are found on one node.

        Raises:
            TrainError: no node that is there has room for them.
        """
        there = {str(one["NodeID"]) for one in self._cluster.nodes}
        gone = [at for at, place in enumerate(places) if place.node not in there]
        if not gone:
            return list(places)
        found = list(places)
        # Ray would find new places by itself for a group that stood in, and hold them in vain.
        self._remove({places[at].group for at in gone} - {0})
        for name in dict.fromkeys(together[at] for at in gone):
            its = [at for at in gone if together[at] == name]
            for at, place in zip(its, self._on_one_node(len(its)), strict=True):
                found[at] = place
        return self._addressed(found)

    def _on_one_node(self, count: int) -> list[Place]:
        from ray.util.placement_group import placement_group_table

        number = self._take(count, {"strategy": "STRICT_PACK"})
        if number is None:
            nodes = self._cluster.nodes
            raise TrainError(
                f"a node of the Ray cluster is lost, and the {len(nodes)} that are there have no "
                f"room on one of them for its {count} trainer ranks: within {_PATIENCE_S:.0f} s "
                f"they have {_resources(self._cluster)}. The run goes on from its last checkpoint "
                "when it is started on a cluster with room, or with fewer ranks"
            )
        nodes_of = placement_group_table(self._groups[number])["bundles_to_node_id"]
        return [Place(bundle, str(nodes_of[bundle]), "", number) for bundle in range(count)]

    def actor(self, holder: type, place: Place, *, threads: int = 1, gpus: float = 0.0) -> Any:
        """An actor class with the options of a place; `.remote(...)` starts it.

        Args:
            holder: the class.
            threads: calls at once.
            gpus: share of the place's GPU.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return self._cluster.ray.remote(holder).options(
            num_cpus=SLIVER,
            num_gpus=gpus if self.has_gpus else 0,
            max_concurrency=threads,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._groups[place.group], placement_group_bundle_index=place.bundle
            ),
        )

    def close(self) -> None:
        """Give the places back."""
        self._remove(set(self._groups))

    def _remove(self, groups: set[int]) -> None:
        from ray.util.placement_group import remove_placement_group

        for number in groups:
            remove_placement_group(self._groups.pop(number))


def _resources(cluster: Cluster) -> str:
    free: dict[str, float] = cluster.ray.available_resources()
    return ", ".join(f"{free.get(name, 0):g} {name} free" for name in ("CPU", "GPU"))


def _nodes(cluster: Cluster, nodes: Sequence[int], has_gpus: bool) -> list[dict[str, Any]]:
    """Which nodes of the cluster those of the plan are."""
    alive = cluster.in_order
    wanted = [nodes.count(number) for number in range(max(nodes) + 1)]
    chosen: list[dict[str, Any]] = []
    for count in wanted:
        fits = (one for one in alive if not has_gpus or one["Resources"].get("GPU", 0) >= count)
        node = next((one for one in fits if one not in chosen), None)
        if node is None:
            has = ", ".join(f"{one['Resources'].get('GPU', 0):g}" for one in alive)
            raise ConfigError(
                f"the plan asks for nodes with {', '.join(map(str, wanted))} devices, the Ray "
                f"cluster has {len(alive)} nodes (GPUs of each: {has}); ask for fewer nodes or "
                "devices (--actor-num-nodes, --actor-num-gpus-per-node, --rollout-num-gpus)"
            )
        chosen.append(node)
    return chosen
