"""Engines that die, stand still, or die while they take weights: the run trains on every sample
once, and nothing outlives it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.observe.run_dir import RunDir
from tests.loop.good_run import Place, make_shared
from tests.loop.same import assert_every_step_once, sample_indices
from tests.loop.tiny import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
NUM_STEPS, GROUPS, SIBLINGS, TOKENS = 20, 4, 2, 12
SHARED_MEMORY = Path("/dev/shm")
WAIT_S = 60.0


class Driver:
    """tests/loop/fleet_driver.py, running."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.loop.fleet_driver"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **asked: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(WAIT_S)


class FleetRun:
    """A run on three quick engines, and what they witnessed."""

    def __init__(self, driver: Driver, place: Place, **delays: float) -> None:
        self.run_dir, self._witness = place.run_dir, place.own / "witness.jsonl"
        self._witness.touch()
        self._driver, self._place, self._delays = driver, place, delays
        self.pid, self._code = 0, None

    def start(self, **changes: object) -> FleetRun:
        own: dict[str, object] = {
            "rollout_engine": "quick",
            "rollout_num_engines": 3,
            "num_rollout": NUM_STEPS,
            "rollout_batch_size": GROUPS,
            "n_samples_per_prompt": SIBLINGS,
            "rollout_max_response_len": TOKENS,
            "rollout_health_check_interval": 0.3,
            "rollout_health_check_timeout": 2,
            "custom_rm_path": None,
            "rm_type": "f1",
        }
        flags = self._place.flags(**{**own, **changes})
        delays = {f"QUICK_{name.upper()}": str(value) for name, value in self._delays.items()}
        self.pid = self._driver.ask(
            argv=["train", *flags],
            env={"QUICK_WITNESS": str(self._witness), **delays},
            out=str(self._place.own / "out.txt"),
        )["pid"]
        return self

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self._code is None and self.pid:
            self._code = self._driver.ask(poll=self.pid)["code"]
        return self._code

    @property
    def output(self) -> str:
        return (self._place.own / "out.txt").read_text()

    @property
    def log(self) -> str:
        return RunDir(self.run_dir).log.read_text()

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._witness.read_text().splitlines()]

    def pids(self) -> set[int]:
        return {event["pid"] for event in self.events()}

    def busy(self) -> list[int]:
        """Engines that have a request now."""
        open_requests: Counter[int] = Counter()
        for event in self.events():
            step = {"begin": 1, "answer": -1}.get(event["event"], 0)
            open_requests[event["pid"]] += step
        return [pid for pid, count in open_requests.items() if count > 0 and lives(pid)]

    def answers(self) -> int:
        return sum(event["event"] == "answer" for event in self.events())

    def loading(self) -> list[int]:
        """Engines that take weights now."""
        last = {event["pid"]: event["event"] for event in self.events()}
        return [pid for pid, event in last.items() if event == "loading" and lives(pid)]

    def wait_for(self, found: Callable[[], Any]) -> Any:
        """What `found` gives, once it is true."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if value := found():
                return value
            assert self.poll() is None, self.output
            time.sleep(0.005)
        raise AssertionError(f"waited in vain; {self.output}\n{self.log}")

    def join(self) -> int:
        deadline = time.monotonic() + WAIT_S
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self._code is not None, self.output
        return self._code

    def weights(self) -> set[Path]:
        """Where its weights are, as far as they are there still."""
        found = {event["path"] for event in self.events() if event["event"] == "loading"}
        places = {Path(path).parent for path in found}
        assert all(place.parent == SHARED_MEMORY for place in places)
        return {place for place in places if place.exists()}

    def end(self) -> None:
        if self.pid and self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.join()
        wait_until_gone(self.pids())


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 15
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if lives(pid)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    made = Driver()
    yield made
    made.close()


@pytest.fixture
def new_run(driver: Driver, shared: Path, tmp_path: Path) -> Iterator[Callable[..., FleetRun]]:
    runs: list[FleetRun] = []

    def make(name: str = "run", **delays: float) -> FleetRun:
        own = tmp_path / name
        own.mkdir()
        runs.append(FleetRun(driver, Place(shared, own), **delays))
        return runs[-1]

    yield make
    for run in runs:
        run.end()
    deadline = time.monotonic() + 10
    while any(run.weights() for run in runs) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(run.weights() for run in runs)


def samples(run: FleetRun) -> list[dict[str, Any]]:
    paths = sorted((run.run_dir / "samples").glob("step_*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def assert_each_sample_once(run: FleetRun) -> None:
    """No step, no sample is missing or there twice, and each was made by the weights of its
    step."""
    assert_every_step_once(run.run_dir, NUM_STEPS)
    assert sorted(sample_indices(run.run_dir)) == list(range(NUM_STEPS * GROUPS * SIBLINGS))
    for number, sample in enumerate(samples(run)):
        step = number // (GROUPS * SIBLINGS)
        assert set(sample["weight_versions"]) == {str(step)}, sample
        assert sample["response_length"] == TOKENS


def assert_answers_only_with_the_weights_of_now(run: FleetRun) -> None:
    """Every engine had taken weights before it began with a request, and each restarted one those
    that the others had."""
    newest = 0
    for event in run.events():
        if event["event"] == "loaded":
            newest = max(newest, int(event["version"]))
        if event["event"] == "begin":
            assert event["version"] == str(newest), event


def test_twenty_engines_killed_in_a_run_cost_no_sample(new_run: Callable[..., FleetRun]) -> None:
    whole = new_run("whole").start()
    run, rng, struck = new_run("killed", token_s=0.02).start(), random.Random(5), []
    for answers in range(4, 144, 7):
        run.wait_for(lambda answers=answers: run.answers() >= answers)
        pid = rng.choice(run.wait_for(run.busy))
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        struck.append(pid)
        run.wait_for(lambda pid=pid: not lives(pid))
    assert run.join() == 0, run.output
    assert whole.join() == 0, whole.output
    assert len(set(struck)) == 20
    last = read_metrics(run.run_dir)[-1]
    # Those that were killed last may not have been back in time.
    assert last["engines/restarts"] >= 17
    assert last["engines/resent_requests"] >= 20
    assert len(run.pids()) >= 20
    assert_each_sample_once(run)
    assert_answers_only_with_the_weights_of_now(run)
    made = [(one["index"], one["tokens"]) for one in samples(run)]
    assert made == [(one["index"], one["tokens"]) for one in samples(whole)]
    facts = json.loads((run.run_dir / "result.json").read_text())["engines"]
    assert len(facts) == 3
    assert sum(one["answered"] for one in facts) == NUM_STEPS * GROUPS * SIBLINGS


def test_engines_that_stand_still_are_replaced_and_those_that_wake_in_time_go_on(
    new_run: Callable[..., FleetRun],
) -> None:
    run, rng, stopped = new_run(token_s=0.02).start(), random.Random(6), []
    for number in range(8):
        pid = rng.choice(run.wait_for(run.busy))
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)
        if number % 2:
            time.sleep(0.1)
            # By now it may have been found and killed.
            if lives(pid):
                os.kill(pid, signal.SIGCONT)
        else:
            run.wait_for(lambda pid=pid: not lives(pid))
    assert run.join() == 0, run.output
    assert run.log.count("it stands still") >= 4
    assert_each_sample_once(run)
    assert_answers_only_with_the_weights_of_now(run)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_lost_while_it_takes_weights_is_replaced_by_one_that_has_them(
    new_run: Callable[..., FleetRun], signum: signal.Signals
) -> None:
    run, struck = new_run(load_s=0.05, token_s=0.005).start(), []
    while len(struck) < 5:
        pid = run.wait_for(run.loading)[0]
        os.kill(pid, signum)
        struck.append(pid)
        run.wait_for(lambda pid=pid: not lives(pid))
    assert run.join() == 0, run.output
    assert_each_sample_once(run)
    assert_answers_only_with_the_weights_of_now(run)


def test_a_trainer_that_is_killed_leaves_no_engine_and_no_weights(
    new_run: Callable[..., FleetRun],
) -> None:
    run = new_run(token_s=0.05).start()
    run.wait_for(run.busy)
    pids = run.pids()
    assert len([pid for pid in pids if lives(pid)]) == 3
    assert run.weights()
    os.kill(run.pid, signal.SIGKILL)
    assert run.join() == -signal.SIGKILL
    wait_until_gone(pids)
    deadline = time.monotonic() + 10
    while run.weights() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not run.weights()


def test_a_signal_ends_the_run_and_its_engines(new_run: Callable[..., FleetRun]) -> None:
    run = new_run(token_s=0.05).start()
    run.wait_for(run.busy)
    os.kill(run.pid, signal.SIGTERM)
    assert run.join() == 128 + signal.SIGTERM, run.output
    wait_until_gone(run.pids())


def test_without_repairs_the_first_death_ends_the_run(new_run: Callable[..., FleetRun]) -> None:
    run = new_run(token_s=0.02).start(use_fault_tolerance=False)
    os.kill(run.wait_for(run.busy)[0], signal.SIGKILL)
    assert run.join() == 1
    assert "--use-fault-tolerance" in run.output
    wait_until_gone(run.pids())
