"""Who gets which devices."""

import pytest

from dovetail.config.resolve import resolve
from dovetail.runtime.layout import Coordinates, Layout
from dovetail.runtime.machine import found
from dovetail.runtime.plan import Cluster, Plan, plan
from dovetail.types.errors import ConfigError


def _plan(flags: str, cluster: Cluster | None = None) -> Plan:
    return plan(resolve([], flags.split()).config, cluster or Cluster())


def _places(made: Plan) -> tuple[list[tuple[int, int]], list[list[tuple[int, int]]]]:
    ranks = [(one.device.node, one.device.index) for one in made.trainer_ranks]
    return ranks, [[(d.node, d.index) for d in one.devices] for one in made.engines]


def test_local_is_one_process_that_shares_its_tensors() -> None:
    made = _plan("--num-threads 2")
    assert made.describe() == (
        "local: one process on cpu, 2 threads, engine and trainer share their tensors"
    )
    assert made.shares_tensors and made.engines[0].shares_tensors
    assert [one.rank for one in made.trainer_ranks] == [0]
    assert made.device == "cpu"
    assert _plan("", Cluster(has_cuda=True)).device == "cuda:0"
    ahead = _plan("--num-threads 2 --max-lag 1")
    assert (
        ahead.describe()
        == "local: one process on cpu, 2 threads, the engine on a copy of the weights"
    )
    apart = _plan("--rollout-num-engines 2")
    assert not apart.shares_tensors and len(apart.engines) == 2


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        _plan("--device cuda")


def test_colocated_engines_sit_on_the_trainers_devices() -> None:
    made = _plan("--colocate --actor-num-nodes 2 --actor-num-gpus-per-node 2")
    ranks, engines = _places(made)
    assert ranks == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert engines == [[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)]]
    assert made.describe() == (
        "colocated: 2 nodes of 2 CPU processes; 4 trainer ranks (dp 4), 4 engines, "
        "in turns on the same devices"
    )


def test_disaggregated_engines_get_what_the_trainer_leaves() -> None:
    flags = (
        "--mode disaggregated --actor-num-gpus-per-node 4 --rollout-num-gpus 8 "
        "--rollout-num-gpus-per-engine 2 --rollout-engine vllm"
    )
    ranks, engines = _places(_plan(flags, Cluster(True, gpus=(8, 4))))
    assert ranks == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert engines == [
        [(0, 4), (0, 5)],
        [(0, 6), (0, 7)],
        [(1, 0), (1, 1)],
        [(1, 2), (1, 3)],
    ]
    assert _plan(flags).nodes == (4, 4, 4)
    assert _plan(f"{flags} --num-gpus-per-node 8").nodes == (8, 8)


def test_ranks_are_counted_as_megatron_core_does() -> None:
    split = Layout(world=16, dp_shard=2, pp=2, cp=2, tp=2, ep=4, etp=1)
    assert split.at(5) == Coordinates(dp_shard=1, pp=0, cp=0, tp=1, ep=1, etp=0)
    assert split.at(10) == Coordinates(dp_shard=0, pp=1, cp=1, tp=0, ep=2, etp=0)
    assert (split.dp, split.edp) == (2, 2)


@pytest.mark.parametrize(
    ("flags", "gpus", "expected"),
    [
        ("--colocate --actor-num-gpus-per-node 8", (4,), "1 node of 8 devices, there are 0"),
        (
            "--mode disaggregated --actor-num-gpus-per-node 4 --rollout-num-engines 8",
            (8,),
            "8 engines of 1 devices each do not fit: the trainer leaves 4 devices",
        ),
    ],
)
def test_too_few_devices_are_refused_with_the_numbers(
    flags: str, gpus: tuple[int, ...], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        _plan(flags, Cluster(True, gpus=gpus))


def _on_ray(flags: str, *nodes: dict[str, float]) -> Plan:
    config = resolve([], f"{flags} --mode disaggregated --ray-address a:1".split()).config
    told = [{"NodeID": str(at), "Resources": one} for at, one in enumerate(nodes)]
    return plan(config, found(config, told, 80))


def test_a_plan_counts_the_nodes_and_gpus_of_its_ray_cluster() -> None:
    flags, nodes = "--actor-num-gpus-per-node 4", [{"GPU": 2.0}, {"GPU": 4.0}, {"CPU": 64.0}]
    with pytest.raises(ConfigError, match=r"leaves 2 devices \(of each node: 2, 0, 0\)"):
        _on_ray(f"{flags} --rollout-num-engines 3", *nodes)
    made = _on_ray(f"{flags} --rollout-num-engines 2", *nodes)
    assert made.device == "cuda" and made.nodes == (2, 4, 0)
    ranks, engines = _places(made)
    assert ranks == [(1, 0), (1, 1), (1, 2), (1, 3)] and engines == [[(0, 0)], [(0, 1)]]


def test_a_cluster_without_gpus_has_as_many_processes_as_are_asked_for_on_its_nodes() -> None:
    flags = "--actor-num-nodes 2 --rollout-num-engines 2 --num-gpus-per-node 2"
    two = ({"CPU": 4.0, "memory": 5e9}, {"CPU": 4.0, "memory": 3e9})
    assert _on_ray(flags, *two).nodes == (2, 2)
    with pytest.raises(ConfigError, match="asks for 2 nodes, the Ray cluster at a:1 has 1"):
        _on_ray(flags, two[0])
    config = resolve([], []).config
    nodes = [{"Resources": one} for one in two]
    assert found(config, nodes, None).memory_bytes == 3e9
    assert found(config, [{"Resources": {"GPU": 8.0}}], 80) == Cluster(True, (8,), memory_bytes=80)
