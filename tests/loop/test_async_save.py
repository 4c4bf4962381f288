"""Two ranks on Ray that write their checkpoints while the run goes on: `async_save`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.cli.main import main
from dovetail.run.saving import Saving
from tests.loop.good_run import Place, make_shared
from tests.loop.same import losses, sample_indices
from tests.loop.tiny import read_metrics, without_times
from tests.on_ray import nothing_left

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("async save")]

STEPS, GROUPS, SIBLINGS = 4, 2, 4
RANKS = {
    "mode": "disaggregated",
    "actor_num_gpus_per_node": 2,
    "rollout_num_engines": 1,
    "num_rollout": STEPS,
    "rollout_batch_size": GROUPS,
    "n_samples_per_prompt": SIBLINGS,
    "lr": 1e-2,
    "save_interval": 1,
    "save_keep": STEPS,
    "async_save": True,
}
STRIKES = """
import os
import signal
from pathlib import Path

from tests.on_ray import holding

here = Path(__file__).parent


def reward(sample):
    # Of the third step: the checkpoint after the second one is being written, or not committed.
    if sample.index == 17 and not (here / "struck").exists():
        found = sorted(path.name for path in (here / "run" / "checkpoints").iterdir())
        (here / "struck").write_text(" ".join(found))
        os.kill(WHOM, signal.SIGKILL)
    return float(sum(map(str.isdigit, sample.response)))
"""
BEFORE = ".unfinished-step_000002 step_000001"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def whole(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that waits for its checkpoints."""
    place = Place(shared, tmp_path_factory.mktemp("whole"))
    assert main(place.train(**{**RANKS, "async_save": False})) == 0
    return place


def struck(place: Place, whom: str) -> str:
    source = STRIKES.replace("WHOM", whom)
    return f"{place.write('strike.py', source)}:reward"


def assert_as(whole: Place, place: Place) -> None:
    """The same steps, and the same checkpoints."""
    assert losses(place.run_dir) == pytest.approx(losses(whole.run_dir), rel=1e-6, abs=1e-9)
    assert sorted(sample_indices(place.run_dir)) == list(range(STEPS * GROUPS * SIBLINGS))
    ours, theirs = (checkpoints(one.run_dir) for one in (place, whole))
    assert [path.name for path in ours] == [path.name for path in theirs]
    for path, other in zip(ours, theirs, strict=True):
        mine, its = (json.loads((one / "manifest.json").read_text()) for one in (path, other))
        assert mine["files"].keys() == its["files"].keys()


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").iterdir())


def test_a_lost_rank_drops_what_was_being_written_and_the_run_goes_on_from_the_one_before(
    whole: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    original = Saving.begin

    def begin(self: Saving, position: tuple[int, bool], *given: object) -> None:
        begun.append(position[0])
        original(self, position, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Saving, "begin", begin)
    place = Place(whole.shared, tmp_path)
    reward = struck(place, 'holding(here / "run")["trainer_rank_1"]')
    with nothing_left():
        assert main(place.train(**RANKS, custom_rm_path=reward)) == 0
    assert (tmp_path / "struck").read_text() == BEFORE
    assert begun == [1, 2, 2, 3], "the last one is waited for"
    assert_as(whole, place)
    assert without_times(read_metrics(place.run_dir))[-1]["trainer/restarts"] == 1.0
    said = capfd.readouterr().err
    assert "a checkpoint that was being written is dropped" in said


def test_after_kill_9_the_run_goes_on_from_the_checkpoint_that_was_committed(
    whole: Place, tmp_path: Path
) -> None:
    place = Place(whole.shared, tmp_path)
    flags = place.train(**RANKS, custom_rm_path=struck(place, "os.getpid()"))
    killed = subprocess.run([sys.executable, "-m", "dovetail", *flags], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "struck").read_text() == BEFORE
    assert main([*flags, "--load", str(place.run_dir / "checkpoints")]) == 0
    assert_as(whole, place)
