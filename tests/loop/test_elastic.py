"""Engines join and leave a running job, through its router: tokens, order and versions are those of
the undisturbed run, every sample is there once, and nobody is left or ended who should not be."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.engines.process import HeldPort
from tests.loop import test_engines_killed as killed
from tests.loop.good_run import Place, make_shared
from tests.loop.same import assert_every_step_once, sample_indices
from tests.loop.tiny import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

GROUPS, SIBLINGS, TOKENS = 2, 2, 8
MANY = 2000
"""Steps: a run of so many is never through before it is told to leave."""
TIMES = 20
PROGRAM = Path(__file__).parents[1] / "quick_engine.py"

driver = killed.driver


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


class Outside:
    """An engine that somebody else started."""

    def __init__(self, witness: Path, token_s: float) -> None:
        self._port = HeldPort()
        self.url = self._port.url
        numbers = [str(self._port.number), str(witness), str(token_s), "0.01"]
        self.process = subprocess.Popen([sys.executable, "-I", "-S", str(PROGRAM), *numbers])

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._port.close()


class Elastic(killed.FleetRun):
    """A run whose router is at a known port, and engines beside it."""

    def __init__(self, driver: killed.Driver, place: Place, **delays: float) -> None:
        super().__init__(driver, place, **delays)
        self._port = HeldPort()
        self.url, self.port = self._port.url, self._port.number
        self.outside = [Outside(self._witness, 0.004) for _ in range(2)]

    def ask(self, path: str, url: str) -> tuple[int, Any]:
        body = json.dumps({"url": url}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def workers(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/workers", timeout=60) as answer:
            return {one["url"]: one for one in json.loads(answer.read())["workers"]}

    def end(self) -> None:
        for one in self.outside:
            one.end()
        super().end()
        self._port.close()


@pytest.fixture
def new_run(
    driver: killed.Driver, shared: Path, tmp_path: Path
) -> Iterator[Callable[..., Elastic]]:
    runs: list[Elastic] = []

    def make(name: str) -> Elastic:
        own = tmp_path / name
        own.mkdir()
        runs.append(Elastic(driver, Place(shared, own), token_s=0.004, load_s=0.01))
        return runs[-1]

    yield make
    for run in runs:
        run.end()
    assert not any(run.weights() for run in runs)


def start(run: Elastic, **changes: object) -> Elastic:
    run.start(
        **{
            "num_rollout": MANY,
            "rollout_batch_size": GROUPS,
            "n_samples_per_prompt": SIBLINGS,
            "rollout_max_response_len": TOKENS,
            "rollout_num_engines": 2,
            "serve_router": "true",
            "router_port": run.port,
            **changes,
        }
    )
    run.wait_for(lambda: run.answers() > 0)
    return run


def churn(run: Elastic, rng: random.Random) -> list[str]:
    """Engines come and go so often; the run's own two leave first. Gives who left."""
    own, left, added, removed = list(run.workers()), [], 0, 0
    while removed < TIMES:
        there = run.workers()
        away = [one.url for one in run.outside if one.url not in there]
        if away and (added <= removed or len(there) == 1):
            assert run.ask("/add_worker", rng.choice(away))[0] == 200
            added += 1
        else:
            inside = [url for url in own if url in there]
            url = inside[0] if inside and len(there) > 1 else rng.choice(list(there))
            status, said = run.ask("/remove_worker", url)
            assert status == 200, said
            left.append(url)
            removed += 1
        time.sleep(rng.uniform(0.0, 0.05))
        assert run.poll() is None, f"over after {added} joined and {removed} left"
    assert added >= TIMES - 2
    return left


@pytest.mark.parametrize("max_lag", [0, 1])
def test_engines_join_and_leave_twenty_times_in_a_run(
    new_run: Callable[..., Elastic], max_lag: int
) -> None:
    run = start(new_run("elastic"), max_lag=max_lag)
    own = [pid for pid in run.pids() if pid not in {one.pid for one in run.outside}]
    left = churn(run, random.Random(7))
    os.kill(run.pid, signal.SIGTERM)
    assert run.join() == 128 + signal.SIGTERM, run.output
    done = read_metrics(run.run_dir)[-1]["step"]
    assert done > 1
    whole = start(new_run("whole"), max_lag=max_lag, num_rollout=done)
    assert whole.join() == 0, whole.output
    assert_every_step_once(run.run_dir, done)
    assert sorted(sample_indices(run.run_dir)) == list(range(done * GROUPS * SIBLINGS))
    made = [(one["index"], one["tokens"]) for one in killed.samples(run)]
    assert made == [(one["index"], one["tokens"]) for one in killed.samples(whole)]
    for number, sample in enumerate(killed.samples(run)):
        step = number // (GROUPS * SIBLINGS)
        versions = {int(one) for one in sample["weight_versions"]}
        assert step - max_lag <= min(versions) and max(versions) <= step, sample
    began = {event["pid"]: event["version"] for event in run.events() if event["event"] == "begin"}
    assert "default" not in began.values()
    facts = json.loads((run.run_dir / "result.json").read_text())["engines"]
    assert sum(one["left"] for one in facts) == len(left) == TIMES
    asked, step = done * GROUPS * SIBLINGS, GROUPS * SIBLINGS
    assert asked <= sum(one["answered"] for one in facts) <= asked + (max_lag + 1) * step
    assert not [pid for pid in own if killed.lives(pid)]
    assert all(killed.lives(one.pid) for one in run.outside)
    assert read_metrics(run.run_dir)[-1]["engines/restarts"] == 0


def test_who_can_not_join_is_told_why(new_run: Callable[..., Elastic]) -> None:
    run = start(new_run("run"), rollout_max_response_len=4 * TOKENS)
    status, said = run.ask("/add_worker", "http://127.0.0.1:9")
    assert status == 502 and "nothing listens" in str(said)
    status, said = run.ask("/add_worker", run.url)
    assert status in (409, 502), said
    os.kill(run.pid, signal.SIGTERM)
    assert run.join() == 128 + signal.SIGTERM, run.output
