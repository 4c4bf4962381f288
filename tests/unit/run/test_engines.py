"""What a run tells the engines that it starts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dovetail.config.run import RunConfig
from dovetail.run.engines import make_fleet

PLAN = SimpleNamespace(device="cuda:0", num_threads=2, engines=[None])
FLAGS = {"vllm": "--enable-sleep-mode", "sglang": "--enable-memory-saver"}


def argv(engine: str, directory: Path, **runtime: Any) -> list[str]:
    """Of the first engine, by an interpreter that says yes to everything."""
    python = directory / "python"
    python.write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
    python.chmod(0o755)
    given = {
        "model": {"hf_checkpoint": str(directory), "device": "cuda"},
        "engine": {"rollout_engine": engine, "engine_python": str(python)},
        "runtime": runtime,
    }
    models: Any = SimpleNamespace(context_len=64, plan=PLAN)
    (spec,) = make_fleet(RunConfig.model_validate(given), models, {}).specs
    assert spec.launch is not None
    return spec.launch(4242).argv


@pytest.mark.parametrize("engine", FLAGS)
def test_engines_that_rest_are_started_so_that_they_can(engine: str, tmp_path: Path) -> None:
    assert FLAGS[engine] in argv(engine, tmp_path, mode="colocated")
    assert FLAGS[engine] in argv(engine, tmp_path, mode="disaggregated", offload_rollout=True)
    assert FLAGS[engine] not in argv(engine, tmp_path, mode="colocated", offload_rollout=False)
    assert FLAGS[engine] not in argv(engine, tmp_path, mode="disaggregated")
