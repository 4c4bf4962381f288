"""The same seed gives the same run, also when it is interrupted, damaged or short of disk space."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.checkpoint import hf
from dovetail.checkpoint.manager import load_checkpoint
from dovetail.cli.main import main
from dovetail.rewards.score import Scorer
from dovetail.run.parts import Run
from dovetail.trainers.torch.backend import TorchBackend
from tests.loop.same import assert_every_step_once, assert_same_run, sample_indices
from tests.loop.tiny import make_model, make_rows, read_metrics, without_times

NUM_STEPS, GROUPS, SIBLINGS, PROMPTS = 6, 2, 4, 5
REWARD = """
def reward(sample):
    return sum(c.isdigit() for c in sample.response) / max(1, len(sample.response))
"""
COMMON = (
    f"--num-rollout {NUM_STEPS} --rollout-batch-size {GROUPS} --label-key label --rollout-shuffle "
    "--max-tokens-per-gpu 32 --lr 1e-3 --save-interval 1 --progress plain --no-use-tensorboard "
    "--device cpu --num-threads 1 --num-steps-per-rollout 2"
).split()
GRPO = f"--n-samples-per-prompt {SIBLINGS} --rollout-max-response-len 8".split()
SFT = ["--loss-type", "sft_loss"]


class Task:
    """A model, data and a reward, and runs of them below one directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = make_model(path / "model")
        self.rows = make_rows(path / "rows.jsonl", PROMPTS)
        self.held_out = make_rows(path / "held_out.jsonl", 3)
        (path / "user.py").write_text(REWARD, encoding="utf-8")

    def train(
        self, run_dir: Path, *flags: object, load: bool = False, kind: list[str] = GRPO
    ) -> int:
        """One run; its exit code."""
        own = ["--hf-checkpoint", self.model, "--prompt-data", self.rows, "--run-dir", run_dir]
        own += ["--custom-rm-path", f"{self.path / 'user.py'}:reward"] if kind is GRPO else []
        own += ["--load", run_dir / "checkpoints"] if load else []
        return main(["train", *COMMON, *kind, *map(str, own), *map(str, flags)])

    def whole(self, kind: list[str] = GRPO, *flags: object) -> Path:
        """The directory of a run that nothing disturbed, made once."""
        run_dir = self.path / "-".join(["whole", *map(str, (*kind[:1], *flags[:1]))])
        if not run_dir.exists():
            assert self.train(run_dir, *flags, kind=kind) == 0
        return run_dir

    @property
    def evaluation(self) -> tuple[object, ...]:
        """Flags of an evaluation every two steps."""
        return ("--eval-interval", 2, "--eval-prompt-data", "held_out", self.held_out)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(tmp_path_factory.mktemp("task"))


def on_call(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, number: int, act: Callable[[], None]
) -> None:
    """Call `act` just before the `number`-th call of a method (from 1)."""
    calls = 0
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_same_seed_gives_the_same_run(task: Task, tmp_path: Path) -> None:
    assert task.train(tmp_path / "again") == 0
    assert_same_run(task.whole(), tmp_path / "again")
    assert sorted(sample_indices(tmp_path / "again")) == list(range(NUM_STEPS * GROUPS * SIBLINGS))


def test_another_seed_gives_another_run(task: Task, tmp_path: Path) -> None:
    assert task.train(tmp_path / "other", "--rollout-seed", 43) == 0
    ours, theirs = read_metrics(task.whole()), read_metrics(tmp_path / "other")
    assert without_times(ours) != without_times(theirs)
    assert [row["rollout/reward"] for row in ours] != [row["rollout/reward"] for row in theirs]


@pytest.mark.parametrize("kind", [GRPO, SFT], ids=["grpo", "sft"])
def test_a_run_that_is_prolonged_in_the_middle_of_an_epoch_is_the_longer_run(
    task: Task, tmp_path: Path, kind: list[str]
) -> None:
    run_dir = tmp_path / "run"
    assert task.train(run_dir, "--num-rollout", 1, kind=kind) == 0
    assert task.train(run_dir, "--num-rollout", 4, kind=kind, load=True) == 0
    source = load_checkpoint(run_dir / "checkpoints").part("source")[1]
    assert source["position"] not in (0, PROMPTS)
    assert task.train(run_dir, load=True, kind=kind) == 0
    assert_every_step_once(run_dir, NUM_STEPS)
    assert_same_run(task.whole(kind), run_dir)


def test_a_run_directory_alone_is_enough_to_go_on_in_it(task: Task, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert task.train(run_dir, "--num-rollout", 3) == 0
    flags = ["--hf-checkpoint", task.model, "--prompt-data", task.rows, "--load", run_dir]
    flags += ["--custom-rm-path", f"{task.path / 'user.py'}:reward"]
    assert main(["train", *COMMON, *GRPO, *map(str, flags)]) == 0
    assert_same_run(task.whole(), run_dir)


def test_saved_samples_train_the_same_model_again_also_when_that_is_resumed(
    task: Task, tmp_path: Path
) -> None:
    samples, run_dir = tmp_path / "samples" / "{rollout_id}.jsonl", tmp_path / "again"
    assert task.train(tmp_path / "first", "--save-debug-rollout-data", samples) == 0
    replay = ("--load-debug-rollout-data", samples)
    assert task.train(run_dir, *replay, "--num-rollout", 2) == 0
    assert task.train(run_dir, *replay, load=True) == 0
    ours, theirs = (
        [{k: v for k, v in row.items() if k.startswith("train/")} for row in read_metrics(path)]
        for path in (run_dir, tmp_path / "first")
    )
    assert ours == theirs
    policies = [
        (path / "checkpoints" / f"step_{NUM_STEPS:06d}" / "policy.safetensors").read_bytes()
        for path in (run_dir, tmp_path / "first", task.whole())
    ]
    assert policies[0] == policies[1] == policies[2]


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (Scorer, "score", 3 * GROUPS * SIBLINGS - 2),
        (TorchBackend, "step", 5),
        (Run, "report_step", 3),
    ],
    ids=["in a rollout", "in training", "after training"],
)
def test_a_run_that_is_terminated_leaves_with_a_checkpoint_and_resumes(
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    number: int,
) -> None:
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patched:
        on_call(patched, owner, name, number, terminate)
        assert task.train(run_dir, "--save-interval", 100) == 128 + signal.SIGTERM
    left = load_checkpoint(run_dir / "checkpoints")
    assert left.step == (2 if owner is Scorer else 3)
    assert task.train(run_dir, load=True) == 0
    assert_every_step_once(run_dir, NUM_STEPS)
    assert_same_run(task.whole(), run_dir)


def test_an_interrupted_evaluation_is_run_after_the_resume_and_once(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patched:
        # 3 held-out prompts before the first step, two steps, and the second of 3 prompts again.
        on_call(patched, Scorer, "score", 3 + 2 * GROUPS * SIBLINGS + 2, terminate)
        assert task.train(run_dir, *task.evaluation) == 128 + signal.SIGTERM
    assert load_checkpoint(run_dir / "checkpoints").part("loop")[1]["evaluated"] is False
    assert task.train(run_dir, *task.evaluation, load=True) == 0
    rows = [row["step"] for row in read_metrics(run_dir) if "eval/held_out/reward" in row]
    assert rows == [0, 2, 4, 6]
    assert_same_run(task.whole(GRPO, *task.evaluation), run_dir)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert task.train(run_dir, "--num-rollout", 3) == 0
    policy = run_dir / "checkpoints" / "step_000003" / "policy.safetensors"
    content = bytearray(policy.read_bytes())
    content[len(content) // 2] ^= 1
    policy.write_bytes(content)
    assert task.train(run_dir, load=True) == 0
    said = capsys.readouterr()
    assert "step_000003: policy.safetensors" in said.err + (run_dir / "log.txt").read_text()
    assert "resumed after step 2" in said.out
    assert_every_step_once(run_dir, NUM_STEPS)
    assert_same_run(task.whole(), run_dir)


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"

    def die() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        on_call(patched, Run, "save", 1, die)
        assert task.train(run_dir, *task.evaluation) == 130
    assert read_metrics(run_dir) != []
    assert task.train(run_dir, *task.evaluation, load=True) == 0
    assert_same_run(task.whole(GRPO, *task.evaluation), run_dir)


@pytest.fixture
def file_limit() -> Iterator[Callable[[int | None], None]]:
    """Lets no file of this process grow beyond so many bytes: a full disk, as far as we can see."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size_bytes: int | None) -> None:
        soft = before[0] if size_bytes is None else size_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(None)


def test_a_save_that_fails_is_counted_and_the_run_goes_on(
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file_limit: Callable[[int | None], None],
) -> None:
    run_dir = tmp_path / "run"
    on_call(monkeypatch, Run, "save", 3, lambda: file_limit(100_000))
    on_call(monkeypatch, Run, "rollout", 4, lambda: file_limit(None))
    assert task.train(run_dir) == 0
    rows = read_metrics(run_dir)
    counts = [row.pop("checkpoint/failed_saves", 0.0) for row in rows]
    assert counts == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert without_times(rows) == without_times(read_metrics(task.whole()))
    assert "checkpoint of step 3 was not written" in (run_dir / "log.txt").read_text()


def test_an_export_that_fails_is_counted_and_costs_no_checkpoint(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    exports = tmp_path / "exports"

    put_in_place = hf.put_in_place

    def refuse(aside: Path, path: Path, replaced: Path) -> None:
        if path.name == "step-2":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put_in_place(aside, path, replaced)

    monkeypatch.setattr(hf, "put_in_place", refuse)
    template = exports / "step-{rollout_id}"
    assert task.train(run_dir, "--save-hf", template, "--num-rollout", 3) == 0
    assert sorted(path.name for path in exports.iterdir()) == ["step-1", "step-3"]
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step_000002", "step_000003"]
    assert read_metrics(run_dir)[-1]["checkpoint/failed_saves"] == 1.0


def test_a_last_save_that_fails_ends_with_an_error_and_can_be_made_up_for(
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file_limit: Callable[[int | None], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patched:
        on_call(patched, Run, "save", NUM_STEPS, lambda: file_limit(100_000))
        assert task.train(run_dir) == 1
    file_limit(None)
    assert "checkpoint of step 6 was not written" in capsys.readouterr().err
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step_000004", "step_000005"]
    assert task.train(run_dir, load=True) == 0
    assert_every_step_once(run_dir, NUM_STEPS)
    assert_same_run(task.whole(), run_dir)
