"""Where ranks are started, and for how long they are waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dovetail.runtime.ray import placement as placing
from dovetail.runtime.ray.actor import Answer, Stage
from dovetail.runtime.ray.group import TrainerGroup
from dovetail.runtime.ray.placement import Place, Placement
from dovetail.types.errors import TrainerLostError, TrainError

NEVER = object()


class Ref:
    """Of a call."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


class Actor:
    """A rank; `silent`: a call that it never answers."""

    def __init__(self, silent: str | None) -> None:
        self._silent = silent
        self.call = SimpleNamespace(remote=self._call)
        self.calls: list[str] = []
        self.killed = False

    def _call(self, name: str, *given: Any) -> Any:
        self.calls.append(name)
        answer = NEVER if name == self._silent else Answer(4000)
        return Ref(answer)


class Cluster:
    """Nodes with rooms for one process each; a placement group takes them, one after another."""

    own_address = "10.0.0.1"

    def __init__(self, **rooms: int) -> None:
        self.rooms, self.groups = dict(rooms), {}  # type: dict[str, int], dict[Any, list[str]]
        self.ray = SimpleNamespace(available_resources=lambda: {"CPU": sum(self.rooms.values())})

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "NodeManagerAddress": f"10.0.0.{name}"} for name in self.rooms]

    in_order = nodes

    def take(self, bundles: Sequence[Any], strategy: str = "PACK", **how: Any) -> Any:
        wanted = [one[placing._NODE_LABEL] for one in how.get("bundle_label_selector", [])]
        if strategy == "STRICT_PACK":
            first = next((name for name, free in self.rooms.items() if free >= len(bundles)), None)
            wanted = [first] * len(bundles) if first else []
        for name in wanted:
            self.rooms[name] -= 1
        group = SimpleNamespace(wait=lambda timeout_seconds: bool(wanted))
        self.groups[id(group)] = wanted
        group.nodes = wanted
        return group

    def remove(self, group: Any) -> None:
        for name in self.groups.pop(id(group)):
            if name in self.rooms:
                self.rooms[name] += 1


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake: Any = ModuleType("ray")
    fake.get = lambda ref: ref.answer
    fake.kill = lambda actor, no_restart: setattr(actor, "killed", True)

    def wait(refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        done = [one for one in refs if one.answer is not NEVER][:num_returns]
        time.sleep(0 if done else 0.01)
        return done, []

    fake.wait = wait
    fake.exceptions = SimpleNamespace(RayError=OSError, RayActorError=OSError)
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, ray: Any) -> Cluster:
    made = Cluster(**{"1": 2, "2": 2, "3": 0})
    groups: Any = ModuleType("ray.util.placement_group")
    groups.placement_group, groups.remove_placement_group = made.take, made.remove
    groups.placement_group_table = lambda group: {
        "bundles_to_node_id": dict(enumerate(group.nodes))
    }
    monkeypatch.setitem(sys.modules, "ray.util", ModuleType("ray.util"))
    monkeypatch.setitem(sys.modules, "ray.util.placement_group", groups)
    return made


def placement(cluster: Any, nodes: Sequence[int]) -> Placement:
    return Placement(cluster, nodes, has_gpus=False)


def group(actors: Sequence[Actor], meet_timeout_s: float) -> TrainerGroup:
    waiting = iter(actors)
    places = [Place(number, "1", "10.0.0.1") for number in range(len(actors))]
    made: Any = SimpleNamespace(
        actor=lambda *given, **how: SimpleNamespace(remote=lambda *given: next(waiting))
    )
    return TrainerGroup(
        lambda: (made, places),
        lambda name: Stage(name, f"{name}.log", (), ""),
        lambda: {},
        meet_timeout_s=meet_timeout_s,
    )


@pytest.mark.parametrize("silent", ["there", "invite", "meet"])
def test_ranks_that_never_come_end_the_start_by_name(ray: Any, silent: str) -> None:
    late = 0 if silent == "invite" else 1
    actors = [Actor(silent if number == late else None) for number in range(3)]
    # 2 s more than this for ranks that meet, which tell more themselves.
    with pytest.raises(TrainerLostError, match=f"rank {late} of 3 did not answer within 0.05 s"):
        group(actors, 0.05).start()
    assert all(actor.killed for actor in actors)


def test_ranks_that_have_met_are_waited_for_however_long_they_load(ray: Any) -> None:
    actors = [Actor(None), Actor(None)]
    group(actors, 30.0).start()
    assert actors[1].calls == ["there", "meet", "build"]
    assert not any(actor.killed for actor in actors)


def test_places_stay_while_their_nodes_do(cluster: Cluster) -> None:
    made = placement(cluster, [0, 0, 1])
    assert [one.node for one in made.places] == ["1", "1", "2"]
    assert {one.address for one in made.places[:2]} == {"10.0.0.1"}
    assert made.standing(made.places, [0, 0, 1]) == made.places


def test_ranks_of_a_lost_node_move_together_to_one_that_has_room(cluster: Cluster) -> None:
    made = placement(cluster, [0, 1, 1])
    del cluster.rooms["2"]
    cluster.rooms["3"] = 2
    found = made.standing(made.places, [0, 1, 1])
    assert [one.node for one in found] == ["1", "3", "3"]
    assert [(one.group, one.bundle) for one in found] == [(0, 0), (1, 0), (1, 1)]
    assert found[1].address == "10.0.0.3"
    # Lost again, what stood in is given back; the first group has the others still.
    del cluster.rooms["3"]
    cluster.rooms["4"] = 2
    again = made.standing(found, [0, 1, 1])
    assert [one.node for one in again] == ["1", "4", "4"]
    assert len(cluster.groups) == 2
    made.close()
    assert not cluster.groups and cluster.rooms == {"1": 2, "4": 2}


def test_places_that_are_all_on_this_machine_now_need_no_network(cluster: Cluster) -> None:
    made = placement(cluster, [0, 1])
    del cluster.rooms["2"]
    assert {one.address for one in made.standing(made.places, [0, 1])} == {"127.0.0.1"}


def test_a_lost_node_that_nothing_can_stand_in_for_is_told(cluster: Cluster) -> None:
    made = placement(cluster, [0, 1, 1])
    del cluster.rooms["2"]
    with pytest.raises(TrainError, match="the 2 that are there have no room on one of them for"):
        made.standing(made.places, [0, 1, 1])
    assert len(cluster.groups) == 1
