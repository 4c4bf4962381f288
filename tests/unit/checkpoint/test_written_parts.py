"""Parts of a checkpoint that write themselves: ranks of a trainer, each its own files."""

import json

import pytest
import torch

from dovetail.checkpoint.manager import CheckpointManager, load_checkpoint
from dovetail.types import CheckpointError


def shards(directory):
    (directory / "policy").mkdir()
    for rank in range(2):
        (directory / "policy" / f"shard-{rank}.safetensors").write_bytes(bytes([rank]) * 100)
    return {"world": 2}


def saved(directory, part=shards):
    manager = CheckpointManager(directory, keep=2)
    manager.save(1, {"loop": ({"w": torch.ones(3)}, {"evaluated": True}), "policy": shards})
    return manager.save(2, {"loop": ({"w": torch.ones(3)}, {"evaluated": True}), "policy": part})


def test_a_part_that_writes_itself_comes_back_as_its_directory_and_its_facts(tmp_path):
    path = saved(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.path == path and loaded.step == 2
    assert dict(loaded.written) == {"policy": {"world": 2}}
    assert loaded.part("loop")[1] == {"evaluated": True}
    shard = loaded.directory("policy") / "policy" / "shard-1.safetensors"
    assert shard.read_bytes() == b"\x01" * 100


def test_every_file_that_it_wrote_is_verified(tmp_path):
    path = saved(tmp_path)
    (path / "policy" / "policy" / "shard-1.safetensors").write_bytes(b"\x02" * 100)
    loaded = load_checkpoint(tmp_path)
    assert loaded.step == 1
    assert "policy/policy/shard-1.safetensors has changed" in loaded.skipped[0]


def test_a_file_of_it_that_is_gone_is_found(tmp_path):
    path = saved(tmp_path)
    (path / "policy" / "policy" / "shard-0.safetensors").unlink()
    assert "is missing" in load_checkpoint(tmp_path).skipped[0]


def test_one_that_fails_leaves_the_older_checkpoints_and_nothing_else(tmp_path):
    def broken(directory):
        (directory / "half").write_bytes(b"x")
        raise CheckpointError("rank 1 has no disk")

    with pytest.raises(CheckpointError, match="rank 1 has no disk"):
        saved(tmp_path, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("name", ["a b", "-x", "..hidden"])
def test_it_may_not_write_names_that_no_manifest_holds(tmp_path, name):
    def odd(directory):
        (directory / name).write_bytes(b"x")
        return {}

    with pytest.raises(CheckpointError, match="which no manifest holds"):
        saved(tmp_path, odd)


def test_it_may_write_a_table_whose_name_begins_with_a_dot(tmp_path):
    def megatron(directory):
        (directory / ".metadata").write_bytes(b"x")
        return {}

    path = saved(tmp_path, megatron)
    (path / "policy" / ".metadata").write_bytes(b"y")
    assert ".metadata has changed" in load_checkpoint(tmp_path).skipped[0]


def test_asking_for_its_tensors_says_that_there_are_none(tmp_path):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match="as ranks of a trainer wrote it"):
        load_checkpoint(tmp_path).part("policy")


def test_a_checkpoint_without_such_parts_keeps_its_format(tmp_path):
    manager = CheckpointManager(tmp_path, keep=1)
    path = manager.save(1, {"loop": ({}, {})})
    assert json.loads((path / "manifest.json").read_text())["format_version"] == 1
    assert json.loads((saved(tmp_path) / "manifest.json").read_text())["format_version"] == 2
