"""SIGINT and SIGTERM: the first saves and leaves, the second leaves at once; nothing stays behind.

Every run is a forked child in a session of its own. The user's functions hold it at a known place:
they write a file `here` and wait for a file `go`, so no test depends on the speed of the machine.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dovetail.cli.main import main
from tests.loop.good_run import Place, make_shared
from tests.loop.same import assert_every_step_once, assert_same_run

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")

NUM_STEPS = 6
HOLDING = """
import asyncio, time
from pathlib import Path

HERE, GO = Path(__file__).with_name("here"), Path(__file__).with_name("go")
GROUP_TO_HOLD = {group}


async def reward(sample):
    if sample.group_index == GROUP_TO_HOLD:
        HERE.touch()
        while not GO.exists():
            await asyncio.sleep(0.01)
    return float(sum(map(str.isdigit, sample.response)))


def post_process(args, samples):
    raw = [sample.reward for sample in samples]
    if samples[0].group_index == GROUP_TO_HOLD:
        HERE.touch()
        while not GO.exists():
            time.sleep(0.01)
    return raw, raw
"""


@dataclass
class Child:
    """A run in a process of its own, which leads a session."""

    pid: int
    log: Path

    def signal_all(self, signum: int) -> None:
        """What Ctrl-C in a terminal does: every process of the run gets it."""
        os.killpg(self.pid, signum)

    def exit_code(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def left_behind(self) -> list[str]:
        """Live processes of the session other than its leader."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, fields = stat.read_text().rpartition(")")
            except OSError:
                continue
            state, _, _, session = fields.split()[:4]
            if int(session) == self.pid and state != "Z":
                found.append(name)
        return found


def _start(argv: list[str], log: Path) -> Child:
    pid = os.fork()
    if pid:
        return Child(pid, log)
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 99
    try:
        code = main(argv)
    finally:
        os._exit(code)


def _wait_for(happened: Callable[[], object], child: Child) -> None:
    while not happened():
        assert os.waitpid(child.pid, os.WNOHANG) == (0, 0), child.log.read_text()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Place:
    return Place(shared, tmp_path)


def _flags(place: Place, directory: str, hold_group: int = -1, **changes: object) -> list[str]:
    """A run in `directory` whose functions lie in `directory.user`."""
    file = place.write(f"{directory}.user/hooks.py", HOLDING.replace("{group}", str(hold_group)))
    ready: dict[str, object] = {
        "run_dir": place.own / directory,
        "num_rollout": NUM_STEPS,
        "n_samples_per_prompt": 4,
        "rollout_max_response_len": 8,
        "lr": 1e-3,
        "rollout_shuffle": True,
        "eval_interval": 2,
        "eval_prompt_data": ["few", f"{place.shared}/rows.jsonl@[0:3]"],
        "custom_rm_path": f"{file}:reward",
        # Its rehearsal would reach the place that the functions hold the run at.
        "check_hooks": False,
    }
    return place.train(**{**ready, **changes})


def _user_file(place: Place, directory: str, name: str) -> Path:
    return place.own / f"{directory}.user" / name


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["rollout", "training"])
def test_the_first_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(
    place: Place, signum: int, where: str
) -> None:
    def flags(directory: str, hold_group: int = -1) -> list[str]:
        hooks = _user_file(place, directory, "hooks.py")
        training = {"custom_reward_post_process_path": f"{hooks}:post_process"}
        if where == "rollout":
            return _flags(place, directory, hold_group)
        reward = f"{place.shared / 'good.py'}:reward"
        return _flags(place, directory, hold_group, **training, custom_rm_path=reward)

    at_the_end = ["--save-interval", "100"]
    whole = _start([*flags("whole"), *at_the_end], place.own / "whole.log")
    child = _start(flags("cut", hold_group=6), place.own / "cut.log")
    _wait_for(_user_file(place, "cut", "here").exists, child)
    os.kill(child.pid, signum)
    if where == "training":
        _wait_for(lambda: "once more leaves at once" in child.log.read_text(), child)
        _user_file(place, "cut", "go").touch()
    assert child.exit_code() == 128 + signum
    text = child.log.read_text()
    name = signal.Signals(signum).name
    assert f"{name}: saving, then leaving; once more leaves at once" in text
    assert "Traceback" not in text and "error" not in text
    done = 3 if where == "rollout" else 4
    saved = [path.name for path in (place.own / "cut" / "checkpoints").iterdir()]
    assert saved == [f"step_{done:06d}"]
    assert child.left_behind() == []

    _user_file(place, "cut", "go").touch()
    load = ["--load", str(place.own / "cut" / "checkpoints")]
    resumed = _start([*flags("cut", 6), *at_the_end, *load], place.own / "resumed.log")
    assert resumed.exit_code() == 0, resumed.log.read_text()
    assert whole.exit_code() == 0, whole.log.read_text()
    assert_every_step_once(place.own / "cut", NUM_STEPS)
    assert_same_run(place.own / "whole", place.own / "cut")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_leaves_at_once(place: Place, signum: int) -> None:
    hooks = _user_file(place, "cut", "hooks.py")
    argv = _flags(
        place,
        "cut",
        2,
        custom_rm_path=None,
        rm_type="math",
        custom_reward_post_process_path=f"{hooks}:post_process",
    )
    child = _start(argv, place.own / "cut.log")
    _wait_for(_user_file(place, "cut", "here").exists, child)
    assert child.left_behind()
    child.signal_all(signum)
    _wait_for(lambda: "once more leaves at once" in child.log.read_text(), child)
    time.sleep(0.6)  # Sooner, it is the same wish said twice.
    child.signal_all(signum)
    assert child.exit_code() == 128 + signum
    assert "Traceback" not in child.log.read_text()
    while child.left_behind():
        time.sleep(0.01)


def test_ctrl_c_reaches_reward_workers_too_and_nobody_complains(place: Place) -> None:
    file = place.write("cut.user/hooks.py", HOLDING.replace("{group}", "4"))
    argv = _flags(
        place,
        "cut",
        4,
        custom_rm_path=None,
        rm_type="math",
        custom_reward_post_process_path=f"{file}:post_process",
    )
    child = _start(argv, place.own / "cut.log")
    _wait_for(_user_file(place, "cut", "here").exists, child)
    child.signal_all(signal.SIGINT)
    _wait_for(lambda: "once more leaves at once" in child.log.read_text(), child)
    _user_file(place, "cut", "go").touch()
    assert child.exit_code() == 130
    text = child.log.read_text()
    assert "Traceback" not in text and "error" not in text
    assert (place.own / "cut" / "checkpoints" / "step_000003").is_dir()
    while child.left_behind():
        time.sleep(0.01)


def test_a_signal_before_the_first_step_leaves_a_run_that_can_go_on(place: Place) -> None:
    child = _start(_flags(place, "cut", 0), place.own / "cut.log")
    _wait_for(_user_file(place, "cut", "here").exists, child)
    os.kill(child.pid, signal.SIGTERM)
    assert child.exit_code() == 143
    _user_file(place, "cut", "go").touch()
    load = ["--load", str(place.own / "cut" / "checkpoints")]
    resumed = _start([*_flags(place, "cut", 0), *load], place.own / "resumed.log")
    assert resumed.exit_code() == 0, resumed.log.read_text()
    assert_every_step_once(place.own / "cut", NUM_STEPS)
