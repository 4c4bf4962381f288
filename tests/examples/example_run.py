"""One example's run file on the arithmetic task's untrained model, for a few steps on a CPU: on
the embedded engine, and by one flag on a real vLLM.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli.main import main
from examples.arithmetic.make_task import make_task
from tests.integration.vllm_server import vllm_python
from tests.loop.tiny import read_metrics

ROOT = Path(__file__).parents[2]
QUIET = "--progress plain --no-use-tensorboard --device cpu --num-threads 1"

RunExample = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arithmetic task: model/, train.jsonl, heldout.jsonl."""
    directory = tmp_path_factory.mktemp("task")
    make_task(directory, seed=0)
    return directory


@pytest.fixture(params=["embedded", pytest.param("vllm", marks=pytest.mark.timeout(600))])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine of the runs."""
    if request.param == "vllm":
        monkeypatch.setenv("DOVETAIL_VLLM_PYTHON", vllm_python())
    return str(request.param)


@pytest.fixture
def run_example(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> RunExample:
    """`run_example(name, "--num-rollout", 3, ...)` trains, and gives the rows of metrics.jsonl."""
    monkeypatch.chdir(ROOT)
    numbers = itertools.count()

    def run(name: str, *flags: Any) -> list[dict[str, Any]]:
        run_dir = tmp_path / f"run{next(numbers)}"
        own = ["--hf-checkpoint", task / "model", "--run-dir", run_dir]
        own += ["--prompt-data", task / "train.jsonl", "--rollout-engine", engine, *flags]
        file = f"examples/{name}/run.toml"
        assert main(["train", file, *QUIET.split(), *map(str, own)]) == 0
        return read_metrics(run_dir)

    return run


def samples_of(tmp_path: Path, step: int, run: int = 0) -> list[dict[str, Any]]:
    """The samples of one step, as a run keeps them."""
    file = tmp_path / f"run{run}" / "samples" / f"step_{step:06}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
