"""What becomes of a run on Ray when something in it fails: named, in seconds, with nothing left.
What can go on does. One cluster of two raylets serves all of these runs and has to outlive them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli.main import main
from tests.loop.good_run import Place, make_shared
from tests.loop.same import losses, sample_indices
from tests.loop.tiny import read_metrics, without_times
from tests.on_ray import processes_of, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("ray")]

GROUPS, SIBLINGS = 2, 4
STEPS = 4
KILLS_A_RANK = """
import os
import signal
from pathlib import Path

from tests.on_ray import holding

struck = Path(__file__).with_name("struck.txt")


def reward(sample):
    if sample.index == 17 and not struck.exists():
        found = holding(Path("{run_dir}"))
        struck.write_text(str(found))
        os.kill(found["trainer_rank_1"], signal.SIGKILL)
    return float(sum(map(str.isdigit, sample.response)))
"""
RAISES_ON_ONE_RANK = """
def look(args, rollout_id, rollout_data):
    if args.rank == 1:
        raise KeyError("no such thing on rank 1")
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with two_nodes() as address:
        yield address


def flags(cluster: str, **changes: object) -> dict[str, Any]:
    return {
        "mode": "disaggregated",
        "ray_address": cluster,
        "actor_num_nodes": 2,
        "num_gpus_per_node": 2,
        "rollout_num_engines": 1,
        "num_rollout": STEPS,
        "rollout_batch_size": GROUPS,
        "n_samples_per_prompt": SIBLINGS,
        "lr": 1e-2,
        "save_interval": 1,
        "save_keep": STEPS,
        **changes,
    }


@pytest.fixture(scope="module")
def whole(shared: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that nothing happened to, over two nodes."""
    place = Place(shared, tmp_path_factory.mktemp("whole"))
    assert main(place.train(**flags(cluster))) == 0
    return place


def test_ranks_on_two_nodes_train_one_model(whole: Place) -> None:
    assert sorted(sample_indices(whole.run_dir)) == list(range(STEPS * GROUPS * SIBLINGS))
    assert len(losses(whole.run_dir)) == STEPS


def test_a_lost_rank_is_started_anew_and_nothing_is_lost_or_doubled(
    whole: Place, cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(whole.shared, tmp_path)
    reward = place.write("strike.py", KILLS_A_RANK.format(run_dir=place.run_dir))
    assert main(place.train(**flags(cluster, custom_rm_path=f"{reward}:reward"))) == 0
    assert (tmp_path / "struck.txt").exists()
    assert sorted(sample_indices(place.run_dir)) == list(range(STEPS * GROUPS * SIBLINGS))
    # What follows a checkpoint follows from it exactly.
    assert losses(place.run_dir) == pytest.approx(losses(whole.run_dir), rel=1e-6, abs=1e-9)
    rows = without_times(read_metrics(place.run_dir))
    assert rows[-1]["trainer/restarts"] == 1.0
    told = [line for line in capfd.readouterr().err.splitlines() if "started anew" in line]
    assert len(told) == 1 and "trainer rank 1 is gone" in told[0]


def test_a_rank_lost_too_often_ends_the_run(
    whole: Place, cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(whole.shared, tmp_path)
    reward = place.write("strike.py", KILLS_A_RANK.format(run_dir=place.run_dir))
    given = flags(cluster, custom_rm_path=f"{reward}:reward", max_trainer_restarts=0)
    assert main(place.train(**given)) == 1
    said = capfd.readouterr().err
    assert "trainer rank 1 is gone" in said and "--max-trainer-restarts" in said
    assert "The state after step 2 is saved" in said
    assert not [one for one in processes_of(os.getpid()) if "dovetail serve" in one]


def test_what_a_function_raises_on_one_rank_ends_the_run_in_seconds(
    whole: Place, cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(whole.shared, tmp_path)
    hook = place.write("hook.py", RAISES_ON_ONE_RANK)
    given = flags(cluster, rollout_data_postprocess_path=f"{hook}:look", check_hooks=False)
    assert main(place.train(**given)) == 1
    said = capfd.readouterr().err
    assert "no such thing on rank 1" in said and "trainer rank 1" in said
    log = (place.run_dir / "logs" / "trainer_rank_1.log").read_text()
    assert "Traceback" in log and "hook.py" in log


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_resumed_run_goes_on_exactly_on_as_many_ranks_and_closely_on_others(
    whole: Place, cluster: str, tmp_path: Path, ranks: int
) -> None:
    import shutil

    place = Place(whole.shared, tmp_path)
    shutil.copytree(whole.run_dir / "checkpoints" / "step_000002", tmp_path / "at" / "step_000002")
    given = flags(cluster, load=tmp_path / "at", actor_num_nodes=ranks)
    assert main(place.train(**given)) == 0
    close = {"rel": 1e-6, "abs": 1e-9} if ranks == 2 else {"rel": 1e-3, "abs": 1e-5}
    assert losses(place.run_dir) == pytest.approx(losses(whole.run_dir)[2:], **close)
    assert sorted(sample_indices(place.run_dir)) == list(
        range(2 * GROUPS * SIBLINGS, STEPS * GROUPS * SIBLINGS)
    )


def test_the_cluster_is_left_as_it_was_found(whole: Place, cluster: str) -> None:
    import ray

    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    try:
        deadline = time.monotonic() + 30
        while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    finally:
        ray.shutdown()
