"""Functions of users that raise or hang in the middle of a run: the run ends with their name and
place, what stood is saved, and resumed it is the run that would have been without the fault.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dovetail.cli.main import main
from dovetail.observe.run_dir import RunDir
from tests.loop.good_run import Place, make_shared
from tests.loop.same import assert_every_step_once, assert_same_run
from tests.loop.tiny import read_metrics

NUM_STEPS = 4
BROKEN_STEP = 2
"""Counted from 0: two steps are done before."""
USER = """
import asyncio, time
from pathlib import Path

BROKEN = Path(__file__).with_name("broken")


def fault(step, kind):
    if step < 2 or not BROKEN.exists():
        return
    if kind == "raise":
        raise KeyError("the tool is gone")
    time.sleep(1000)


async def slow_fault(step, kind):
    if kind == "raise":
        fault(step, kind)
    elif step >= 2 and BROKEN.exists():
        await asyncio.sleep(1000)


def step_of(sample):
    return sample.group_index // 2


def reward(sample):
    return float(sum(map(str.isdigit, sample.response)))


def {name}_sample_hook(args, sample):
    fault(step_of(sample), "{name}")


async def {name}_async_sample_hook(args, sample):
    await slow_fault(step_of(sample), "{name}")


def {name}_filter(args, group):
    fault(step_of(group[0]), "{name}")
    return True


async def {name}_sample_filter(args, groups):
    await slow_fault(step_of(groups[0][0]), "{name}")


def {name}_all(args, all_samples):
    fault(step_of(all_samples[0][0]), "{name}")


def {name}_log(rollout_id, args, samples, extra, seconds):
    fault(rollout_id, "{name}")


def {name}_eval_log(rollout_id, args, data, extra):
    fault(rollout_id - 1, "{name}")


def {name}_post_process(args, samples):
    fault(step_of(samples[0]), "{name}")
    raw = [sample.reward for sample in samples]
    return raw, raw


class {name}_Source:
    def __init__(self, call):
        self.inner = call.default()

    def get_samples(self, num_samples):
        groups = self.inner.get_samples(num_samples)
        fault(step_of(groups[0][0]), "{name}")
        return groups

    def add_samples(self, samples):
        self.inner.add_samples(samples)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)
"""
SLOTS = {
    "sample_hook": "rollout_sample_hook_path",
    "async_sample_hook": "rollout_sample_hook_path",
    "filter": "dynamic_sampling_filter_path",
    "sample_filter": "rollout_sample_filter_path",
    "all": "rollout_all_samples_process_path",
    "log": "custom_rollout_log_function_path",
    "eval_log": "custom_eval_rollout_log_function_path",
    "post_process": "custom_reward_post_process_path",
    "Source": "data_source_path",
}
HANGING = ("sample_hook", "async_sample_hook", "sample_filter", "log", "post_process", "Source")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Place:
    return Place(shared, tmp_path)


def _train(place: Place, file: str, leaf: str, name: str, **changes: object) -> list[str]:
    flags: dict[str, object] = {
        "custom_rm_path": f"{file}:reward",
        leaf: f"{file}:{name}",
        "num_rollout": NUM_STEPS,
        "lr": 1e-3,
        "save_interval": NUM_STEPS,
        "eval_interval": 1,
        "eval_prompt_data": ["held", f"{place.shared / 'rows.jsonl'}@[0:2]"],
        "check_hooks": False,
    }
    return place.train(**{**flags, **changes})


CASES = [("raise", slot) for slot in SLOTS] + [("hang", slot) for slot in HANGING]


@pytest.mark.parametrize(("kind", "slot"), CASES)
def test_a_fault_is_told_and_saved_and_the_run_goes_on_from_there(
    place: Place, kind: str, slot: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = place.write("user.py", USER.replace("{name}", kind))
    broken = place.own / "broken"
    broken.touch()
    leaf, name = SLOTS[slot], f"{kind}_{slot}"
    argv = _train(place, file, leaf, name, hook_timeout_s=1)
    started = time.monotonic()
    assert main(argv) == 1
    assert time.monotonic() - started < 60
    told = capfd.readouterr().err
    assert "--" + leaf.replace("_", "-") in told and name in told
    assert f"{file}:" in told
    if kind == "raise":
        assert "KeyError: 'the tool is gone'" in told
        assert f'File "{file}"' in told and 'raise KeyError("the tool is gone")' in told
        log = RunDir(place.run_dir).log.read_text(encoding="utf-8")
        assert "Traceback (most recent call last)" in log and "in fault" in log
    else:
        assert "did not return within 1 s" in told
    if slot in ("sample_hook", "async_sample_hook", "filter"):
        assert "sample 8" in told or "samples 8, 9" in told
    done = 3 if slot == "eval_log" else BROKEN_STEP
    assert f"The state after step {done} is saved" in told
    assert [path.name for path in (place.run_dir / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    broken.unlink()
    assert main([*argv, "--load", str(place.run_dir)]) == 0
    assert_every_step_once(place.run_dir, NUM_STEPS)
    whole = place.own / "whole"
    assert main(_train(place, file, leaf, name, run_dir=whole)) == 0
    assert_same_run(whole, place.run_dir)


ALWAYS = """
import asyncio


def digits(sample):
    return float(sum(map(str.isdigit, sample.response)))


async def generate(args, sample, sampling_params):
    raise OSError("no sandbox")


async def generate_sometimes(call):
    if call.sample.index == 5:
        raise OSError("no sandbox")
    return await call.default(call.sample, call.sampling)


async def generate_hangs_once(call):
    if call.sample.index == 5:
        await asyncio.sleep(1000)
    return await call.default(call.sample, call.sampling)


def reward(sample):
    raise OSError("no judge")


def short(samples):
    return [1.0]


def keep(group):
    return False
"""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"custom_generate_function_path": "generate", "max_failed_groups": 5},
            "5 groups in a row failed",
        ),
        (
            {"custom_rm_path": "reward", "max_reward_failures": 3},
            "failed 3 times in a row",
        ),
        (
            {"dynamic_sampling_filter_path": "keep", "max_dropped_groups": 5},
            "5 groups in a row were dropped",
        ),
        (
            {"custom_rm_path": "short", "group_rm": True},
            "1 rewards for a group of 2 samples",
        ),
    ],
)
def test_a_function_that_always_fails_ends_the_run(
    place: Place, changes: dict[str, object], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = place.write("always.py", ALWAYS)
    paths = {k: f"{file}:{v}" if k.endswith("_path") else v for k, v in changes.items()}
    argv = place.train(
        **{"custom_rm_path": f"{file}:digits", "check_hooks": False, **paths}, num_rollout=2
    )
    assert main(argv) == 1
    error = capfd.readouterr().err
    assert told in error and "Nothing was saved: no step was finished before." in error
    if changes.get("custom_rm_path") == "reward":
        assert 'raise OSError("no judge")' in error


@pytest.mark.parametrize(
    ("name", "failure"),
    [("generate_sometimes", "OSError"), ("generate_hangs_once", "TimeoutError")],
)
def test_where_the_policy_says_so_a_fault_costs_its_group_only(
    place: Place, name: str, failure: str
) -> None:
    file = place.write("always.py", ALWAYS)
    argv = place.train(
        custom_generate_function_path=f"{file}:{name}",
        custom_rm_path=f"{file}:digits",
        num_rollout=3,
        generate_timeout_s=1,
        check_hooks=False,
    )
    assert main(argv) == 0
    rows = read_metrics(place.run_dir)
    assert [row.get(f"rollout/failed/{failure}", 0.0) for row in rows] == [0.0, 1.0, 0.0]


STUCK = """
import ctypes
from pathlib import Path


def process(args, rollout_id, rollout_data):
    if rollout_id == 1:
        # Stands in C code, where no interruption arrives.
        ctypes.CDLL(None).sleep(1000)
"""


def test_a_function_that_stands_in_c_code_on_the_training_thread_does_not_keep_the_run(
    place: Place,
) -> None:
    file = place.write("stuck.py", STUCK)
    argv = place.train(
        rollout_data_postprocess_path=f"{file}:process",
        num_rollout=3,
        hook_timeout_s=1,
        check_hooks=False,
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dovetail", *argv], capture_output=True, text=True, timeout=120
    )
    assert time.monotonic() - started < 60
    assert done.returncode == 1, done.stderr
    assert "--rollout-data-postprocess-path" in done.stderr and "process" in done.stderr
    assert "did not return within 1 s" in done.stderr and "stuck.py:9" in done.stderr
    assert "The state after step 1 is saved" in done.stderr
    assert (place.run_dir / "checkpoints" / "step_000001").is_dir()
