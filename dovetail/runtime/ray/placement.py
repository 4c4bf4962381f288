"""Places on a Ray cluster: one bundle per device of the run, found once, in the order of nodes.

On a machine without GPUs a device is a CPU process and takes a sliver of a CPU: the system shares
out what it has, so that two cores suffice for any number of ranks and engines in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.runtime.ray.cluster import LOOPBACK, Cluster
from dovetail.types.errors import ConfigError

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


class Placement:
    """A placement group with one bundle per device.

    Args:
        nodes: for each device, which node of the plan it is on; several may be on one.
        has_gpus: each device is a GPU; else a CPU process.

    Raises:
        ConfigError: the cluster has too few nodes, or too little is free on them.
    """

    def __init__(self, cluster: Cluster, nodes: Sequence[int], *, has_gpus: bool) -> None:
        self._cluster, self.has_gpus = cluster, has_gpus
        found = _nodes(cluster, nodes, has_gpus)
        from ray.util.placement_group import placement_group

        bundle = {"CPU": 1.0, "GPU": 1.0} if has_gpus else {"CPU": SLIVER * 4}
        self._group = placement_group(
            [dict(bundle) for _ in nodes],
            bundle_label_selector=[{_NODE_LABEL: found[node]["NodeID"]} for node in nodes],
        )
        if not self._group.wait(timeout_seconds=_PATIENCE_S):
            self.close()
            raise ConfigError(
                f"the Ray cluster has no room for {len(nodes)} "
                f"{'GPUs' if has_gpus else 'processes'}: within {_PATIENCE_S:.0f} s it has "
                f"{_resources(cluster)}. Ask for fewer ranks or engines, or end what else runs "
                "there"
            )
        # What stays on this machine needs to be heard by nobody else.
        alone = {one["NodeManagerAddress"] for one in found} == {cluster.own_address}
        self.places = [
            Place(
                bundle,
                found[node]["NodeID"],
                LOOPBACK if alone else found[node]["NodeManagerAddress"],
            )
            for bundle, node in enumerate(nodes)
        ]

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
                placement_group=self._group, placement_group_bundle_index=place.bundle
            ),
        )

    def close(self) -> None:
        """Give the places back."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)


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
