"""A checkpoint that ranks write while the run goes on: when it is there, and what becomes of it."""

import pytest
import torch

from dovetail.checkpoint.manager import CheckpointManager, load_checkpoint
from dovetail.run.saving import Saving
from dovetail.types import CheckpointError, TrainerLostError


class Ranks:
    """Come back when they have copied; the file is there once they are done."""

    def __init__(self):
        self.directory, self.error, self.done, self.waited = None, None, False, 0

    def part(self, directory):
        self.directory, self.done, self.error = directory, False, None
        return {"world": 2}

    def write(self):
        (self.directory / "shard.safetensors").write_bytes(b"x" * 10)
        self.done = True

    def has_saved(self):
        return self.done

    def finish_save(self):
        self.waited += 1
        if self.error is not None:
            raise self.error
        if not self.done:
            self.write()


@pytest.fixture
def saving(tmp_path):
    there = []
    made = Saving(
        CheckpointManager(tmp_path, keep=2), lambda position, path, export: there.append(position)
    )
    made.there = there
    made.save((1, True), parts(Ranks(), whole=True), None)
    yield made
    made.close()


def parts(ranks, whole=False):
    def both(directory):
        facts = ranks.part(directory)
        ranks.write()
        return facts

    return {"loop": ({"w": torch.ones(2)}, {}), "policy": both if whole else ranks.part}


def begun(saving, step=2):
    ranks = Ranks()
    saving.begin((step, True), parts(ranks), None, ranks)
    return ranks


def newest(directory):
    loaded = load_checkpoint(directory)
    assert loaded.skipped == []
    return loaded.step


def until_noticed(saving, step):
    while (step, True) not in saving.there:
        saving.look()


def test_it_is_no_checkpoint_before_all_have_written(saving, tmp_path):
    ranks = begun(saving)
    saving.look()
    assert ranks.waited == 0 and newest(tmp_path) == 1 and saving.there == [(1, True)]
    ranks.write()
    until_noticed(saving, 2)
    assert newest(tmp_path) == 2 and ranks.waited == 1
    assert load_checkpoint(tmp_path).written == {"policy": {"world": 2}}


def test_finish_waits_for_files_and_commit(saving, tmp_path):
    ranks = begun(saving)
    saving.finish()
    assert ranks.waited == 1 and newest(tmp_path) == 2 and saving.there[-1] == (2, True)
    saving.finish()
    assert ranks.waited == 1, "nothing is under way any more"


def test_one_that_is_not_written_is_told_once_and_leaves_nothing(saving, tmp_path):
    ranks = begun(saving)
    ranks.error, ranks.done = CheckpointError("rank 1 has no disk"), True
    with pytest.raises(CheckpointError, match="no disk"):
        saving.look()
    saving.look()
    saving.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    begun(saving, 3)
    saving.finish()
    assert newest(tmp_path) == 3


def test_one_that_can_not_be_committed_is_told_where_it_is_waited_for(saving, tmp_path):
    ranks = begun(saving)
    ranks.done = True
    with pytest.raises(CheckpointError, match="wrote nothing"):
        saving.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_lost_ranks_drop_it_and_the_older_one_stays(saving, tmp_path):
    ranks = begun(saving)
    ranks.error = TrainerLostError("rank 0 is gone")
    saving.settle()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert saving.there == [(1, True)]


def test_lost_ranks_do_not_cost_what_they_have_written(saving, tmp_path):
    ranks = begun(saving)
    ranks.write()
    saving.look()
    ranks.error = TrainerLostError("rank 0 is gone")
    saving.settle()
    assert newest(tmp_path) == 2 and saving.there[-1] == (2, True)


def test_a_process_killed_in_between_leaves_the_older_one_and_the_next_save_cleans_up(
    saving, tmp_path
):
    begun(saving).write()
    assert (tmp_path / ".unfinished-step_000002").is_dir()
    assert newest(tmp_path) == 1
    CheckpointManager(tmp_path, keep=2).save(3, parts(Ranks(), whole=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000003"]


def test_the_end_of_a_run_leaves_nothing_half_written(saving, tmp_path):
    begun(saving)
    saving.close()
    assert newest(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"step_000001", "step_000002"}
