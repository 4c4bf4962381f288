"""Where the Python of an engine is looked for."""

import sys
from pathlib import Path

import pytest

from dovetail.engines.interpreter import interpreter


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose own environment is .venv."""
    monkeypatch.delenv("DOVETAIL_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    return tmp_path


def make_python(root: Path) -> str:
    python = root / ".venvs/vllm/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    return str(python)


def test_without_another_one_it_is_the_python_of_the_run(environment):
    assert interpreter("vllm") == sys.executable


def test_the_one_beside_the_runs_environment_goes_before_the_runs(environment):
    beside = make_python(environment)
    assert interpreter("vllm") == beside
    assert interpreter("sglang") == sys.executable


def test_the_environment_variable_goes_before_what_lies_beside(environment, monkeypatch):
    make_python(environment)
    monkeypatch.setenv("DOVETAIL_VLLM_PYTHON", "/opt/vllm/bin/python")
    assert interpreter("vllm") == "/opt/vllm/bin/python"


def test_what_is_asked_for_goes_before_everything(environment, monkeypatch):
    make_python(environment)
    monkeypatch.setenv("DOVETAIL_VLLM_PYTHON", "/opt/vllm/bin/python")
    assert interpreter("vllm", "/usr/bin/python3") == "/usr/bin/python3"
