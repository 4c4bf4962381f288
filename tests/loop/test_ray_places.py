"""Ranks of a lost node start on another one: real raylets, of which one is killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from dovetail.runtime.ray.actor import Holder, Stage
from dovetail.runtime.ray.cluster import Cluster
from dovetail.runtime.ray.placement import Place, Placement
from tests.on_ray import two_raylets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("ray")]


class Where:
    """Lives in an actor."""

    def node(self) -> str:
        """Ray's id of the node that it is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())


def node_of(cluster: Cluster, placement: Placement, place: Place, directory: Path) -> str:
    """Where an actor of a place comes up."""
    stage = Stage("rank", str(directory / "rank.log"), tuple(sys.path), str(directory))
    actor = placement.actor(Holder, place).remote(stage, f"{__name__}:Where", {})
    found = cluster.ray.get(actor.call.remote("node"), timeout=60)
    assert found.good, found
    cluster.ray.kill(actor)
    return str(found.value)


def test_ranks_of_a_lost_node_start_where_there_is_room(tmp_path: Path) -> None:
    with two_raylets() as (raylets, second):
        cluster = Cluster(str(raylets.address), {})
        cluster.start()
        try:
            own = cluster.ray.get_runtime_context().get_node_id()
            placement = Placement(cluster, [0, 1, 1], has_gpus=False)
            assert [one.node == own for one in placement.places] == [True, False, False]
            raylets.remove_node(second)
            deadline = time.monotonic() + 60
            while len(cluster.nodes) > 1 and time.monotonic() < deadline:
                time.sleep(0.1)
            moved = placement.standing(placement.places, [0, 1, 1])
            assert moved[0] == placement.places[0]
            # What is left of the first group serves on, and what stands in is there.
            assert [node_of(cluster, placement, one, tmp_path) for one in moved] == [own] * 3
            placement.close()
        finally:
            cluster.close()
