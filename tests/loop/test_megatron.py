"""A run whose trainer is Megatron's ranks on Ray: it trains as one process of the torch backend
does, and its checkpoints go on.

`tests.megatron_shim` answers for CUDA in the ranks, where the run's own hook puts it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dovetail.cli.main import main
from tests.loop.good_run import Place, make_shared
from tests.loop.test_modes import Done
from tests.on_ray import processes_of, two_nodes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("megatron runs"),
]

STEPS, GROUPS, SIBLINGS = 4, 2, 4
TASK = {
    "num_rollout": STEPS,
    "rollout_batch_size": GROUPS,
    "n_samples_per_prompt": SIBLINGS,
    "lr": 1e-2,
    # Where a gradient is next to nothing, Adam makes steps of its rounding: not with this eps.
    "adam_eps": 1e-5,
    "save_interval": 1,
    "save_keep": STEPS,
}
RANKS = {
    "mode": "disaggregated",
    "train_backend": "megatron",
    "actor_num_gpus_per_node": 2,
    "num_gpus_per_node": 2,
    "actor_num_nodes": 1,
    "tensor_model_parallel_size": 2,
    "rollout_num_engines": 1,
    "custom_megatron_init_path": "tests.megatron_shim:on_cpu",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        # megatron-core compiles small functions when it is imported: seconds for nothing here.
        patch.setitem(os.environ, "TORCHDYNAMO_DISABLE", "1")
        patch.setitem(os.environ, "CUDA_DEVICE_MAX_CONNECTIONS", "1")
        with two_nodes() as address:
            yield address


def run(shared: Path, own: Path, **changes: object) -> Done:
    place = Place(shared, own)
    assert main(place.train(**{**TASK, "save_hf": own / "export", **changes})) == 0
    return Done(place)


@pytest.fixture(scope="module")
def local(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One process of the torch backend."""
    return run(shared, tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module")
def whole(shared: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two tensor-parallel ranks."""
    return run(shared, tmp_path_factory.mktemp("whole"), ray_address=cluster, **RANKS)


def weights(path: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())


def close(ours: Path, theirs: Path, apart: float) -> None:
    one, other = weights(ours), weights(theirs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=apart, msg=name)


def test_it_trains_and_publishes_as_one_process_does(local: Done, whole: Done) -> None:
    for step in range(1, STEPS + 1):
        ours, theirs = (done.samples(step) for done in (local, whole))
        assert [one["response"] for one in ours] == [one["response"] for one in theirs]
        assert {tuple(one["weight_versions"]) for one in theirs} == {(str(step - 1),)}
    for name in ("train/loss", "train/grad_norm", "rollout/reward", "train/tokens"):
        assert whole.series(name) == pytest.approx(local.series(name), rel=1e-3, abs=1e-5), name
    close(local.export, whole.export, 1e-3)


@pytest.mark.parametrize(
    ("layout", "apart"),
    [
        ({}, 1e-6),
        ({"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2}, 1e-3),
    ],
    ids=["the same ranks", "pipeline stages"],
)
def test_a_resumed_run_goes_on_exactly_and_in_another_layout_closely(
    whole: Done, shared: Path, cluster: str, tmp_path: Path, layout: dict[str, int], apart: float
) -> None:
    saved = whole.run_dir / "checkpoints" / "step_000002"
    shutil.copytree(saved, tmp_path / "at" / "step_000002")
    given = {**RANKS, **layout, "ray_address": cluster, "load": tmp_path / "at"}
    done = run(shared, tmp_path, **given)
    assert done.series("train/loss") == pytest.approx(
        whole.series("train/loss")[2:], rel=apart, abs=apart / 100
    )
    close(whole.export, done.export, apart)


def test_nothing_is_left_running_but_the_cluster(whole: Done) -> None:
    assert not [one for one in processes_of(os.getpid()) if "-m dovetail" in one]
