"""kill -9 of every kind of process of a run on Ray: what can go on does, with every sample trained
on once and the engines back in the pool; what can't ends, and nothing is left of it (many more
kills: benchmarks/kill_actors.py). And an engine that joins such a run and leaves it."""

from __future__ import annotations

import json
import random
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kill_actors import Outcome, one_run, steps_done
from dovetail.cli.main import main
from dovetail.engines.process import HeldPort
from dovetail.runtime.ray.session import remove_left
from examples.arithmetic.make_task import make_task
from tests import serve_process
from tests.loop.good_run import Place, make_shared
from tests.loop.same import assert_every_step_once, sample_indices
from tests.loop.tiny import read_metrics
from tests.on_ray import holding, serving, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("ray kills")]

STEPS, GROUPS, SIBLINGS = 5, 2, 4
STRIKES = """
import os
import signal
import time
from pathlib import Path

from tests.on_ray import holding, serving

RUN = Path({run_dir!r})
KINDS = {{
    9: ("seat", lambda: holding(RUN)["engine_1_seat"], 0),
    17: ("engine", lambda: serving(RUN, 0), 1),
    25: ("rank", lambda: holding(RUN)["trainer_rank_0"], 2),
}}


def back():
    return (RUN / "log.txt").read_text().count("is back")


def reward(sample):
    name, find, before = KINDS.get(sample.index, ("", None, 0))
    struck = Path(__file__).with_name(f"struck_{{name}}.txt")
    if find is not None and not struck.exists():
        deadline = time.monotonic() + 200
        while back() < before and time.monotonic() < deadline:
            time.sleep(0.1)
        pid = find()
        struck.write_text(f"{{pid}} {{back()}}")
        os.kill(pid, signal.SIGKILL)
    return float(sum(map(str.isdigit, sample.response)))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with two_nodes() as address:
        yield address


def _given(cluster: str, reward: str) -> dict[str, Any]:
    return {
        "mode": "disaggregated",
        "ray_address": cluster,
        "actor_num_gpus_per_node": 2,
        "rollout_num_engines": 2,
        "num_gpus_per_node": 4,
        "num_rollout": STEPS,
        "rollout_batch_size": GROUPS,
        "n_samples_per_prompt": SIBLINGS,
        "rollout_health_check_interval": 1,
        "save_interval": 1,
        "custom_rm_path": reward,
        # It waits for what it struck before, which takes its time on a busy machine.
        "reward_timeout_s": 300,
    }


def test_an_engines_actor_an_engine_and_rank_0_are_made_anew_in_one_run(
    cluster: str, tmp_path: Path
) -> None:
    (tmp_path / "shared").mkdir()
    place = Place(make_shared(tmp_path / "shared"), tmp_path / "own")
    reward = place.write("strike.py", STRIKES.format(run_dir=str(place.run_dir)))
    given = _given(cluster, f"{reward}:reward")
    assert main(place.train(**given)) == 0
    struck = {one.stem: one.read_text().split()[1] for one in place.own.glob("struck_*.txt")}
    # Each was struck when the one before was back in the pool.
    assert struck == {"struck_seat": "0", "struck_engine": "1", "struck_rank": "2"}
    assert_every_step_once(place.run_dir, STEPS)
    assert sorted(sample_indices(place.run_dir)) == list(range(STEPS * GROUPS * SIBLINGS))
    last = read_metrics(place.run_dir)[-1]
    assert last["engines/ready"] == 2 and last["engines/restarts"] == 2
    assert last["trainer/restarts"] == 1
    assert not holding(place.run_dir)
    for engine in (0, 1):
        with pytest.raises(LookupError):
            serving(place.run_dir, engine)


def test_a_killed_run_or_raylet_ends_it_all_and_the_next_run_clears_up(tmp_path: Path) -> None:
    task = tmp_path / "task"
    make_task(task, seed=0)
    rays: list[Path] = []
    for kind in ("driver", "raylet"):
        found, directory = Outcome(kind), tmp_path / kind
        directory.mkdir()
        one_run(task, directory, found, 1, random.Random(3))
        assert found.good and found.kills == 1 and found.samples > 0, found
        rays.append(Path(str(found.ray)))
        assert len(rays) == len(set(rays)) and rays[-1].name.startswith("dovetail-ray-")
    # That of the killed run was removed by the next, which Ray may have ended before its own was.
    assert not rays[0].exists()
    remove_left()
    assert not rays[1].exists()


WAITS = """
import time
from pathlib import Path

GATES = {{8: Path({joined!r}), 24: Path({left!r})}}


def reward(sample):
    gate, deadline = GATES.get(sample.index), time.monotonic() + 250
    while gate is not None and not gate.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return float(sum(map(str.isdigit, sample.response)))
"""


def test_an_engine_joins_a_run_on_ray_by_hand_and_leaves_it(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    place = Place(make_shared(tmp_path / "shared"), tmp_path / "own")
    joined, left = tmp_path / "joined.txt", tmp_path / "left.txt"
    reward = place.write("wait.py", WAITS.format(joined=str(joined), left=str(left)))
    port = HeldPort()
    router = port.url

    def visit() -> None:
        said = tmp_path / "serve.txt"
        flags = ("--dtype", "float32", "--num-threads", "1", "--join", router)
        wait_for(lambda: answers(f"{router}/health"))
        with serve_process.serving(place.shared / "model", *flags, log=said) as (_, process):
            wait_for(lambda: "joined:" in said.read_text())
            joined.write_text("")
            wait_for(lambda: steps_done(place.run_dir) >= 3)
            process.send_signal(signal.SIGINT)
            assert process.wait(100) == 0, said.read_text()
            assert "was not told" not in said.read_text()
        left.write_text("")

    with ThreadPoolExecutor(1) as aside:
        visiting = aside.submit(visit)
        given = {
            **_given(cluster, f"{reward}:reward"),
            "serve_router": "true",
            "router_port": port.number,
            "router_policy": "round_robin",
        }
        assert main(place.train(**given)) == 0
        visiting.result(10)
    port.close()
    assert_every_step_once(place.run_dir, STEPS)
    assert sorted(sample_indices(place.run_dir)) == list(range(STEPS * GROUPS * SIBLINGS))
    facts = json.loads((place.run_dir / "result.json").read_text())["engines"]
    assert [one["left"] for one in facts] == [False, False, True]
    assert facts[2]["answered"] > 0 and sum(one["restarts"] for one in facts) == 0


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_for(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.1)
