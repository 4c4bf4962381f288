"""The contract tests of plugins themselves: they fit the table, pass good plugins and name what is
wrong with bad ones, by flag and by variable, also when the folder is copied elsewhere."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.hooks import HOOKS, spec_of

FOLDER = Path(__file__).parents[1] / "plugin_contracts"
FILES = sorted(FOLDER.glob("test_plugin_*_contracts.py"))
PLUGIN = """
from slime.utils.types import Sample

async def good(args, sample, **kwargs):
    return len(sample.response) / 10

async def clears(args, sample, **kwargs):
    sample.tokens = []
    return 1.0

def too_many(args, rollout_id, data_source, model, evaluation=False):
    return 1.0

def nothing(args, samples):
    pass

async def short(args, samples: list[Sample]):
    return [1.0]

async def by_name(args, sample, **kwargs):
    return {"score": 1.0, "note": args.my_note}

def few(args, rollout_id, data_source, evaluation=False):
    return data_source.get_samples(args.rollout_batch_size)

async def unmasked(args, sample, sampling_params):
    sample.tokens = [1, 2, 3]
    sample.response_length, sample.loss_mask = 2, [1]
    sample.status = Sample.Status.COMPLETED
    return sample

def peeks(args, rollout_id, buffer, num_samples):
    return buffer[:num_samples]

def lost(args, samples):
    return [1.0], [1.0]
"""


def text_of(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def run(file, *flags, cwd, **environment):
    """(exit code, output) of a file run as a program."""
    done = subprocess.run(
        [sys.executable, str(file), "-q", "-p", "no:cacheprovider", *map(str, flags)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def project(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    return tmp_path


def slots_of(file):
    listed = re.search(r"^SLOTS = \((.*?)\)$", text_of(file.name), re.DOTALL | re.MULTILINE)
    return re.findall(r'"(\w+)"', listed[1])


def test_the_four_files_have_every_hook_that_every_run_has_exactly_once():
    slots = [slot for file in FILES for slot in slots_of(file)]
    assert len(FILES) == 4
    assert len(set(slots)) == len(slots)
    assert set(slots) == {spec.slot for spec in HOOKS if spec.owner is None}


@pytest.fixture
def contract_paths(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("contract_paths")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_help_lists_the_flags_of_the_file(file, contract_paths, capsys):
    with pytest.raises(SystemExit) as ended:
        contract_paths.run_as_script(str(file), slots_of(file), ["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for slot in slots_of(file):
        assert spec_of(slot).flag in shown
    for flag in re.findall(r"--[\w-]+-path", text_of(file.name).split('"""')[1]):
        assert flag in shown


def test_a_variable_of_any_family_points_at_a_function(contract_paths, monkeypatch):
    slots, samples = ("custom_rm", "buffer_filter"), {"custom_rm": ("native.py:reward",)}
    assert [p.split("/")[-1] for p in contract_paths.targets(slots, samples, "custom_rm")] == [
        "native.py:reward"
    ]
    for prefix in ("MILES", "VIME", "SLIME", "DOVETAIL"):
        monkeypatch.setenv(f"{prefix}_CONTRACT_CUSTOM_RM_PATH", f"{prefix.lower()}.fn")
        found = contract_paths.targets(slots, samples, "custom_rm")
        assert found == [f"{prefix.lower()}.fn"]
        assert contract_paths.targets(slots, samples, "buffer_filter") == []


def test_a_path_of_ones_own_is_all_that_is_tested(project):
    file = FOLDER / "test_plugin_path_loading_contracts.py"
    code, output = run(file, "--custom-rm-path", "mine.good", "-vv", cwd=project)
    assert code == 0, output
    assert "mine.good" in output
    assert "slime_style" not in output and "skipped" not in output


FAULTS = {
    "path_loading": {
        "custom_rm": ("clears", "{'tokens'}"),
        "buffer_filter": ("peeks", "still in the buffer"),
        "dynamic_sampling_filter": ("nothing", "Expected: a DynamicFilterOutput"),
        "eval_function": ("too_many", "yours requires 'model', which is not passed"),
    },
    "rollout": {"rollout_function": ("few", "has no response tokens")},
    "generate": {
        "custom_generate_function": ("unmasked", "loss_mask has 1 entries for 2 response tokens"),
    },
    "runtime_hook": {
        "custom_reward_post_process": ("lost", "1 raw rewards and 1 rewards for 12 samples"),
    },
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_wrong_is_said(kind, project):
    file, flags, environment = FOLDER / f"test_plugin_{kind}_contracts.py", [], {}
    for turn, (slot, (name, _)) in enumerate(FAULTS[kind].items()):
        if turn:
            environment[f"VIME_CONTRACT_{slot.upper()}_PATH"] = f"mine.{name}"
        else:
            flags += [spec_of(slot).flag, f"mine.{name}"]
    code, output = run(file, *flags, cwd=project, **environment)
    assert code == 1, output
    for _, problem in FAULTS[kind].values():
        assert problem in output, output


def test_a_misspelt_flag_or_variable_is_an_error(project):
    file = FOLDER / "test_plugin_path_loading_contracts.py"
    code, output = run(file, "--custom-rn-path", "mine.good", cwd=project)
    assert (code, "did you mean --custom-rm-path?" in output) == (2, True), output
    code, output = run(file, cwd=project, SLIME_CONTRACT_CUSTOM_RN_PATH="mine.good")
    assert (code, "did you mean SLIME_CONTRACT_CUSTOM_RM_PATH?" in output) == (4, True), output


def test_group_rewards_are_counted(project):
    file = FOLDER / "test_plugin_path_loading_contracts.py"
    code, output = run(file, "--custom-rm-path", "mine.short", cwd=project)
    assert code == 1
    assert "1 rewards for a group of 4 samples" in output


def test_the_folder_works_beside_a_repository_of_ones_own_with_its_settings(project):
    copied = project / "tests" / "contracts"
    shutil.copytree(FOLDER, copied, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "mine.yaml").write_text("my_note: noted\n")
    file = copied / "test_plugin_path_loading_contracts.py"
    flags = "--reward-key score --custom-config-path mine.yaml"
    code, output = run(file, "--custom-rm-path", "mine.by_name", "--run-flags", flags, cwd=project)
    assert code == 0, output
