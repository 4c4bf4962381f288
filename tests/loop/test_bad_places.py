"""Places that can't be written: a full disk, a directory without the right to write. Each is its
own process, because it takes rights away from it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.loop.good_run import Place, make_shared

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 24, 1, 2


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Place:
    return Place(shared, tmp_path)


def _files_up_to(num_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def _without_rights_of_root() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def _run(argv: list[str], before: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dovetail", *argv]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=before, check=False)


def test_a_disk_full_at_the_last_save_fails_the_run(place: Place) -> None:
    done = _run(place.train(num_rollout=2, save_interval=1), _files_up_to(100_000))
    *earlier, last = done.stderr.splitlines()
    assert done.returncode == 1
    assert len(earlier) == 1 and earlier[0].startswith("error: a checkpoint is missing: ")
    assert last.startswith("error: checkpoint of step 2 was not written") and "--save" in last
    assert not list((place.run_dir / "checkpoints").iterdir())
    assert len((place.run_dir / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_disk_full_at_the_export_fails_the_run(place: Place) -> None:
    done = _run(place.train(save_hf=place.own / "out"), _files_up_to(50_000))
    assert done.returncode == 1
    assert done.stderr.startswith("error: the exported model was not written")
    assert done.stderr.count("\n") == 1 and "--save-hf" in done.stderr
    assert sorted(p.name for p in place.own.iterdir()) == ["run"]


def test_a_disk_full_from_the_start_fails_the_run(place: Place) -> None:
    done = _run(place.train(), _files_up_to(1_000))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: no space left") and "--run-dir" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="root's rights are taken away as Linux does")
def test_a_directory_without_the_right_to_write_is_a_mistake_in_the_settings(place: Place) -> None:
    os.chmod(place.own, 0o555)
    done = _run(place.train(), _without_rights_of_root)
    os.chmod(place.own, 0o755)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the run directory {place.run_dir} can't be made")
    assert "Permission denied" in done.stderr and "--run-dir" in done.stderr
