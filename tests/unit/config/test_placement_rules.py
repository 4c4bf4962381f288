"""Who lives where: what can't be, and what has no effect."""

import sys

import pytest

from dovetail.config.notes import notes
from dovetail.config.placement_rules import placement_rules
from dovetail.config.resolve import resolve
from dovetail.run.validate import validate_cluster
from dovetail.types.errors import MissingExtraError


def test_sizes_of_a_cluster_are_told_to_do_nothing_in_one_process() -> None:
    resolved = resolve([], ["--actor-num-gpus-per-node", "8", "--tensor-model-parallel-size", "2"])
    (note,) = [one for one in notes(resolved.config) if "mode local" in one]
    assert note.endswith(": --actor-num-gpus-per-node, --tensor-model-parallel-size")
    assert resolved.config.runtime.trainer_ranks == 8


def test_the_backend_of_miles_and_cosmos_rl_is_torch() -> None:
    assert resolve([], ["--train-backend", "fsdp"]).config.trainer.train_backend == "torch"


_LORA = ["--lora-rank", "4"]
_ON_RANKS = ["--mode", "disaggregated"]


@pytest.mark.parametrize(
    "flags",
    [
        [*_LORA, *_ON_RANKS, "--tensor-model-parallel-size", "2"],
        [*_LORA, *_ON_RANKS, "--train-backend", "megatron"],
        [*_ON_RANKS, "--context-parallel-size", "2", "--use-routing-replay"],
    ],
)
def test_what_the_ranks_can_not_do_is_refused(flags: list[str]) -> None:
    config = resolve([], flags).config
    told = list(placement_rules(config))
    assert len(told) == 1 and "use --" in told[0]


def test_adapters_are_trained_in_one_process() -> None:
    assert not list(placement_rules(resolve([], _LORA).config))


@pytest.mark.parametrize("address", ["nonsense", "local", "ray://head:10001", "head", "head:"])
def test_what_is_no_address_of_a_head_is_told_before_anything_is_asked(address: str) -> None:
    (told,) = placement_rules(resolve([], [*_ON_RANKS, "--ray-address", address]).config)
    assert f"got '{address}', expected HOST:PORT" in told and "--ray-address HOST:6379" in told


@pytest.mark.parametrize("address", ["auto", "10.0.0.7:6379", "head.lan:6379", "[::1]:6379"])
def test_addresses_of_a_head_are_let_pass(address: str) -> None:
    assert not list(placement_rules(resolve([], [*_ON_RANKS, "--ray-address", address]).config))


def test_several_nodes_without_a_cluster_are_only_a_plan() -> None:
    flags = [*_ON_RANKS, "--actor-num-nodes", "2"]
    assert any("--ray-address HOST:PORT" in one for one in notes(resolve([], flags).config))
    flags += ["--ray-address", "head:6379"]
    assert not any("--ray-address" in one for one in notes(resolve([], flags).config))


def test_ray_is_missed_before_a_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    validate_cluster(resolve([], []).config)
    with pytest.raises(MissingExtraError, match=r"dovetail-rl\[ray\].*--mode local"):
        validate_cluster(resolve([], _ON_RANKS).config)
