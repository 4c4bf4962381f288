"""Generation during training: the bound holds, and every prompt is in one place, also after kills
and signals."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.cli.main import main
from dovetail.run.parts import Run
from tests.loop.same import assert_every_step_once, sample_indices, source_state
from tests.loop.test_kill_and_resume import drive
from tests.loop.tiny import make_model, make_rows, read_metrics

STEPS, GROUPS, SIBLINGS = 8, 2, 4
USER = """
import asyncio
import random


async def slow(call):
    made = await call.default(call.sample, call.sampling)
    await asyncio.sleep(random.Random(made.index).lognormvariate(-3.0, 1.0))
    return made


def reward(sample):
    return sum(c.isdigit() for c in sample.response) / max(1, len(sample.response))


def keep(group):
    rewards = [sample.reward for sample in group]
    return max(rewards) - min(rewards) > 0.05


class Newest:
    def __init__(self, input):
        self.input, self.waiting = input, []

    async def put(self, entry):
        self.waiting.append(entry)
        if len(self.waiting) > 3:
            self.input.unused_handler_fn(self.waiting.pop(0).prompt_group)

    async def get(self):
        return self.waiting.pop()

    def get_metrics(self):
        return {"size": len(self.waiting)}


def generate_rollout(args, rollout_id, data_source, evaluation=False):
    groups = data_source.get_samples(args.rollout_batch_size)
    for sample in (sample for group in groups for sample in group):
        sample.append_response_tokens(tokens=[5, 6], log_probs=[-4.0, -4.0])
        sample.weight_versions, sample.reward = [str(max(0, rollout_id - 1))], sample.index % 3
        sample.status = sample.Status.COMPLETED
    return groups
"""


class Task:
    """A tiny run whose answers take a while."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make_model(path / "model")
        make_rows(path / "rows.jsonl", 7)
        (path / "user.py").write_text(USER, encoding="utf-8")

    def train(self, name: str, *flags: object, load: bool = False, slow: bool = True) -> int:
        user, run_dir = self.path / "user.py", self.path / name
        own: list[object] = ["--hf-checkpoint", self.path / "model", "--run-dir", run_dir]
        own += ["--prompt-data", self.path / "rows.jsonl", "--label-key", "label"]
        own += ["--custom-rm-path", f"{user}:reward", "--rollout-shuffle", "--lr", 1e-3]
        own += ["--custom-generate-function-path", f"{user}:slow"] if slow else []
        own += ["--num-rollout", STEPS, "--rollout-batch-size", GROUPS]
        own += ["--n-samples-per-prompt", SIBLINGS, "--rollout-max-response-len", 8]
        own += ["--progress", "plain", "--no-use-tensorboard", "--device", "cpu"]
        own += ["--num-threads", 1, "--load", run_dir / "checkpoints"] if load else []
        return main(["train", *map(str, own), *map(str, flags)])

    def hook(self, name: str) -> str:
        return f"{self.path / 'user.py'}:{name}"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(tmp_path_factory.mktemp("async"))


def trained_samples(run_dir: Path) -> list[tuple[int, dict[str, Any]]]:
    """Every sample that was trained on, with the version of the weights that it trained."""
    paths = sorted((run_dir / "samples").glob("step_*.jsonl"))
    return [
        (version, json.loads(line))
        for version, path in enumerate(paths)
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def assert_bound(run_dir: Path, max_lag: int) -> Counter[int]:
    """No token is older than the bound; how many samples have which lag."""
    lags: Counter[int] = Counter()
    for version, sample in trained_samples(run_dir):
        assert sample["weight_versions"], sample["index"]
        lags[version - min(map(int, sample["weight_versions"]))] += 1
    assert min(lags) >= 0 and max(lags) <= max_lag
    rows = read_metrics(run_dir)
    assert max(row["rollout/lag_max"] for row in rows) == max(lags)
    for lag in range(max_lag + 1):
        assert sum(row[f"rollout/lag_{lag}_samples"] for row in rows) == lags[lag]
    return lags


def assert_accounted(run_dir: Path) -> None:
    """Every sample that the source ever gave is trained, dropped and counted, or waits there."""
    rows, state = read_metrics(run_dir), source_state(run_dir)
    trained = sample_indices(run_dir)
    waiting = [sample["index"] for group in state["buffer"] for sample in group]
    known = set(trained) | set(waiting)
    assert len(known) == len(trained) + len(waiting)
    names = ("dropped_groups", "failed_groups", "discarded_groups")
    dropped = sum(row[f"rollout/{name}"] for name in names for row in rows)
    assert len(known) + dropped * SIBLINGS == state["next_index"]


@pytest.mark.parametrize(
    ("max_lag", "flags"),
    [
        (1, ()),
        (2, ("--update-weights-interval", 2)),
        (3, ("--async-data-buffer-capacity-factor", 4)),
        (1, ("--over-sampling-batch-size", 5, "--async-max-concurrent-samples", 12)),
    ],
)
def test_no_token_is_older_than_the_bound_and_every_sample_is_accounted_for(
    task: Task, max_lag: int, flags: tuple[object, ...]
) -> None:
    name = f"bound-{max_lag}-{len(flags)}"
    filtered = ("--dynamic-sampling-filter-path", task.hook("keep"))
    assert task.train(name, "--max-lag", max_lag, *filtered, "--save-interval", 3, *flags) == 0
    assert_every_step_once(task.path / name, STEPS)
    lags = assert_bound(task.path / name, max_lag)
    assert sum(lags[lag] for lag in lags if lag) > 0, "some were made ahead"
    assert_accounted(task.path / name)
    assert all("train/tis" in row for row in read_metrics(task.path / name) if "train/loss" in row)


def test_the_engines_copy_has_the_adapters_merged_in(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = Run.publish, []

    def publish(run: Run, done: int, always: bool = False) -> None:
        original(run, done, always)
        held = dict(run.engines[0]._model.named_parameters())
        policy: Any = run.policy
        sent = dict(policy.trainer.backend.hf_tensors())
        assert sent.keys() == held.keys()
        assert all(torch.equal(tensor, held[name]) for name, tensor in sent.items())
        seen.append(float(held["model.layers.0.self_attn.q_proj.weight"].detach().sum()))

    monkeypatch.setattr(Run, "publish", publish)
    lora = ("--lora-rank", 4, "--lr", 1e-2, "--max-lag", 1, "--save-interval", 4)
    assert task.train("lora", *lora, "--num-rollout", 4) == 0
    assert len(set(seen)) == 5, "every step changed what the engine decodes with"
    assert task.train("lora", *lora, load=True) == 0
    assert seen[5] == seen[4], "a resumed run goes on with the same weights"
    assert_every_step_once(task.path / "lora", STEPS)
    lags = assert_bound(task.path / "lora", 1)
    assert lags[1] > 0
    assert_accounted(task.path / "lora")


def test_requests_under_way_go_on_under_the_weights_of_a_publish(task: Task) -> None:
    long = ("--rollout-max-response-len", 120, "--eval-interval", 3)
    held_out = ("--eval-prompt-data", "few", f"{task.path / 'rows.jsonl'}@[0:2]")
    assert task.train("spans", "--max-lag", 2, *long, *held_out, slow=False) == 0
    spans = [sample["weight_versions"] for _, sample in trained_samples(task.path / "spans")]
    assert any(len(versions) > 1 for versions in spans)
    assert all(sorted(map(int, one)) == list(map(int, one)) for one in spans)
    assert any("eval/few/reward" in row for row in read_metrics(task.path / "spans"))


def test_a_signal_saves_what_is_finished_and_the_run_goes_on(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.train

    def train(run: Run, output: Any) -> Any:
        if run.position[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, output)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", train)
        assert task.train("signal", "--max-lag", 1) == 128 + signal.SIGTERM
    assert_accounted(task.path / "signal")
    assert source_state(task.path / "signal")["buffer"], "what was made ahead is kept"
    assert task.train("signal", "--max-lag", 1, "--save-interval", 99, load=True) == 0
    assert_every_step_once(task.path / "signal", STEPS)
    assert_bound(task.path / "signal", 1)
    assert_accounted(task.path / "signal")


@pytest.mark.parametrize(
    "function",
    [
        "miles.rollout.fully_async_rollout.FullyAsyncRolloutFn",
        "slime.rollout.fully_async_rollout.generate_rollout_fully_async",
    ],
)
def test_the_asynchronous_rollouts_of_miles_and_slime_are_this_one(
    task: Task, function: str
) -> None:
    name = function.rpartition(".")[2]
    flags = ("--rollout-function-path", function, "--max-weight-staleness", 2)
    buffer = ("--custom-async-data-buffer-path", task.hook("Newest"))
    assert task.train(name, *flags, *buffer, "--save-interval", 99) == 0
    assert_bound(task.path / name, 2)
    assert_accounted(task.path / name)
    assert "rollout/buffer/size" in read_metrics(task.path / name)[0]


def test_a_rollout_function_of_the_users_is_called_ahead_and_undone_at_a_signal(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.train

    def train(run: Run, output: Any) -> Any:
        if run.position[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, output)

    flags = ("--rollout-function-path", task.hook("generate_rollout"), "--max-lag", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", train)
        assert task.train("function", *flags) == 128 + signal.SIGTERM
    assert source_state(task.path / "function")["next_index"] == 4 * GROUPS * SIBLINGS
    assert task.train("function", *flags, "--save-interval", 99, load=True) == 0
    every = list(range(STEPS * GROUPS * SIBLINGS))
    assert sorted(sample_indices(task.path / "function")) == every
    assert_bound(task.path / "function", 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "flags",
    ["--save-interval 1", "--save-interval 2 --over-sampling-batch-size 4 --partial-rollout"],
    ids=["plain", "over-sampled"],
)
def test_after_kills_every_prompt_is_trained_once_or_waits(tmp_path: Path, flags: str) -> None:
    report = drive(tmp_path, f"--max-lag 1 {flags}", kills=5, single_kills=1)
    assert {"rollout", "train", "save"} & set(report["died_in"])
    for name in ["whole", *report["names"]]:
        assert_every_step_once(tmp_path / name, 9)
        assert_bound(tmp_path / name, 1)
        assert_accounted(tmp_path / name)
    if "over-sampling" not in flags:
        # Nothing is refused: which prompts are trained does not depend on what was killed.
        whole = sorted(sample_indices(tmp_path / "whole"))
        assert all(sorted(sample_indices(tmp_path / name)) == whole for name in report["names"])
