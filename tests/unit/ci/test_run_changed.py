"""Which tests a change runs, and that the workflow names files and labels that exist."""

from __future__ import annotations

import importlib.util
import subprocess
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load_script():
    loader = SourceFileLoader("run_changed", str(ROOT / ".ci" / "run-changed"))
    spec = importlib.util.spec_from_loader("run_changed", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


SCRIPT = load_script()
ARCHITECTURE = "tests/architecture"


@pytest.mark.parametrize(
    ("changed", "selected"),
    [
        ([], []),
        (["README.md"], [ARCHITECTURE]),
        (["tests/unit/hooks/test_load.py"], [ARCHITECTURE, "tests/unit/hooks/test_load.py"]),
        (
            ["tests/plugin_contracts/test_plugin_rollout_contracts.py"],
            [ARCHITECTURE, "tests/plugin_contracts/test_plugin_rollout_contracts.py"],
        ),
        (
            ["tests/plugin_contracts/plugins/native.py"],
            [ARCHITECTURE, "tests/contract", *sorted(SCRIPT.CONTRACTS)],
        ),
        (["examples/dapo/reward.py"], [ARCHITECTURE, "tests/examples/test_dapo.py"]),
        (["examples/arithmetic/make_task.py"], [ARCHITECTURE, "tests/examples"]),
        (
            ["dovetail/checkpoint/hf.py"],
            [ARCHITECTURE, "tests/loop", "tests/unit/checkpoint"],
        ),
        (["docs/hooks.md"], [ARCHITECTURE, "tests/unit/hooks"]),
        (["pyproject.toml"], ["tests"]),
        (["dovetail/__init__.py", "docs/hooks.md"], ["tests"]),
        (["a/new/place.py"], ["tests"]),
        (["tests/unit/rollout/fakes.py"], [ARCHITECTURE, "tests/unit/rollout"]),
        # A test that is gone can't be run.
        (["tests/unit/rollout/test_of_the_past.py"], [ARCHITECTURE]),
        (
            ["tests/loop/test_signals.py", "tests/loop/good_run.py"],
            [ARCHITECTURE, "tests/loop"],
        ),
    ],
)
def test_a_change_runs_what_it_touches(changed, selected):
    assert SCRIPT.select(changed) == selected


def test_hooks_run_all_four_contract_files_and_their_own_tests():
    selected = SCRIPT.select(["dovetail/hooks/table.py"])
    assert {*SCRIPT.CONTRACTS, "tests/unit/hooks", "tests/contract"} <= set(selected)


def test_every_package_has_a_rule_and_every_rule_leads_to_tests():
    packages = {init.parent.name for init in (ROOT / "dovetail").glob("*/__init__.py")}
    assert set(SCRIPT.PACKAGES) == packages
    listed = [*SCRIPT.PACKAGES.values(), *SCRIPT.FILES.values(), SCRIPT.CONTRACTS]
    assert all((ROOT / target).exists() for targets in listed for target in targets)
    assert all((ROOT / path).exists() for path in SCRIPT.FILES)


def test_commits_edits_and_new_files_count_as_changes(tmp_path, monkeypatch):
    def git(*command):
        own = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *own, *command], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    for name in ("kept.py", "edited.py", "removed.py", "moved on.py"):
        (tmp_path / name).write_text(name)
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("checkout", "-q", "-b", "mine")
    (tmp_path / "committed.py").write_text("1")
    git("rm", "-q", "removed.py")
    git("add", ".")
    git("commit", "-q", "-m", "second")
    git("checkout", "-q", "main")
    (tmp_path / "moved on.py").write_text("2")
    git("commit", "-q", "-a", "-m", "theirs")
    git("checkout", "-q", "mine")
    (tmp_path / "edited.py").write_text("3")
    (tmp_path / "nëw.py").write_text("4")
    monkeypatch.setattr(SCRIPT, "ROOT", tmp_path)
    assert SCRIPT.changed_files("main") == ["committed.py", "edited.py", "nëw.py", "removed.py"]
    with pytest.raises(SystemExit, match="run-changed: git merge-base nowhere HEAD"):
        SCRIPT.changed_files("nowhere")


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_every_workflow_is_valid(file):
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    # YAML 1.1 reads the bare word `on` as true.
    assert {"name", True, "jobs"} <= set(workflow)
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["steps"]
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_the_four_contract_files_run_side_by_side_under_their_label():
    text = (ROOT / ".github/workflows/plugin-contracts.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    job = workflow["jobs"]["contracts"]
    assert "'run-ci-plugin-contracts'" in job["if"] and "'push'" in job["if"]
    assert workflow[True]["push"]["branches"] == ["main"]
    assert "labeled" in workflow[True]["pull_request"]["types"]
    files = [f"tests/plugin_contracts/{name}" for name in job["strategy"]["matrix"]["file"]]
    assert sorted(files) == sorted(SCRIPT.CONTRACTS)
    assert all((ROOT / file).is_file() for file in files)
    assert job["steps"][-1]["run"] == "python tests/plugin_contracts/${{ matrix.file }}"
