"""Checkpoints: what is saved comes back, the newest few are kept, a failed save harms nothing."""

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dovetail.checkpoint import files, manager
from dovetail.checkpoint.manager import CheckpointManager, load_checkpoint
from dovetail.types.errors import CheckpointError


def parts_of(step: int) -> dict[str, manager.Part]:
    return {
        "model": ({"w": torch.full((8, 4), float(step), dtype=torch.bfloat16)}, {}),
        "trainer": ({"m": torch.arange(step + 3)}, {"optimizer_steps": step, "loss": 0.1 * step}),
    }


def assert_is(checkpoint: manager.Checkpoint, step: int) -> None:
    assert checkpoint.step == step
    for name, (tensors, facts) in parts_of(step).items():
        loaded, loaded_facts = checkpoint.part(name)
        assert loaded_facts == facts
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def listing(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def test_what_is_saved_comes_back(tmp_path):
    keeper = CheckpointManager(tmp_path / "deep" / "checkpoints", keep=2)
    path = keeper.save(7, parts_of(7))
    assert path.name == "step_000007"
    assert_is(keeper.load(), 7)
    assert_is(load_checkpoint(path), 7)


def test_every_kind_of_tensor_survives(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12).reshape(3, 4).t(),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.tensor([1e-5], dtype=torch.float16),
        "brain": torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.bfloat16),
        "double": torch.tensor([1 / 3], dtype=torch.float64),
        "gradient": torch.ones(2, requires_grad=True),
    }
    CheckpointManager(tmp_path, keep=1).save(0, {"p": (tensors, {})})
    loaded, _ = load_checkpoint(tmp_path).part("p")
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.allclose(loaded[key], tensor, rtol=0, atol=0, equal_nan=True), key


def test_views_of_one_storage_take_their_own_bytes_and_ties_are_kept(tmp_path):
    fused = torch.randn(3 * 64, 64)
    tensors = {f"{n}_proj": fused[i * 64 : (i + 1) * 64] for i, n in enumerate("qkv")}
    tensors["embed"] = torch.randn(128, 64)
    tensors["lm_head"] = tensors["embed"]
    tensors["overlap"] = fused[32:96]
    path = CheckpointManager(tmp_path, keep=1).save(1, {"model": (tensors, {})})
    elements = 3 * 64 * 64 + 128 * 64 + 64 * 64
    assert 4 * elements <= (path / "model.safetensors").stat().st_size < 4 * elements + 1024
    loaded, _ = load_checkpoint(tmp_path).part("model")
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert loaded["lm_head"].data_ptr() == loaded["embed"].data_ptr()


def test_numpy_and_torch_values_among_the_facts_come_back_as_lists_and_numbers(tmp_path):
    facts = {"a": np.int64(3), "b": [np.arange(2), torch.ones(1)], "c": np.float32(0.5)}
    CheckpointManager(tmp_path, keep=1).save(1, {"p": ({}, facts)})
    expected = {"a": 3, "b": [[0, 1], [1.0]], "c": 0.5}
    assert load_checkpoint(tmp_path).part("p")[1] == expected


def test_facts_keep_floats_and_non_finite_values_exactly(tmp_path):
    facts = {"a": 0.1 + 0.2, "b": [1e-320, float("inf")], "c": None, "d": {"e": [True, 2**70]}}
    CheckpointManager(tmp_path, keep=1).save(1, {"p": ({}, facts)})
    assert load_checkpoint(tmp_path).part("p")[1] == facts


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (({}, {"a": {1: 2}}), "p.facts.a: key 1 is int"),
        (({}, {"a": [b"x"]}), "bytes can't be stored as JSON"),
        (({}, {"a": {"s": {1}}}), "p.facts.a.s: set"),
        (({"t": torch.zeros(2).to_sparse()}, {}), "tensor 't'"),
        (({"t": torch.zeros(2, device="meta")}, {}), "on meta"),
        (({"t": torch.zeros(2, dtype=torch.complex64)}, {}), "complex64"),
        (({"t": [1.0]}, {}), "got list"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name_and_nothing_is_written(tmp_path, part, words):
    with pytest.raises(CheckpointError) as caught:
        CheckpointManager(tmp_path, keep=1).save(1, {"p": part})
    assert words in str(caught.value)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "manifest", "a b"])
def test_part_names_that_could_leave_the_directory_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="part names"):
        CheckpointManager(tmp_path, keep=1).save(1, {name: ({}, {})})


def test_the_newest_few_are_kept(tmp_path):
    keeper = CheckpointManager(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        keeper.save(step, parts_of(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000003", "step_000010"]


def test_only_good_checkpoints_count_as_kept(tmp_path):
    CheckpointManager(tmp_path, keep=2).save(1, parts_of(1))
    CheckpointManager(tmp_path, keep=2).save(2, parts_of(2))
    damaged = tmp_path / "step_000002" / "model.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    CheckpointManager(tmp_path, keep=2).save(3, parts_of(3))
    assert (tmp_path / "step_000001").is_dir(), "the second good one"
    CheckpointManager(tmp_path, keep=2).save(4, parts_of(4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000003", "step_000004"]


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    keeper = CheckpointManager(tmp_path, keep=3)
    keeper.save(4, parts_of(1))
    keeper.save(4, parts_of(4))
    assert_is(keeper.load(), 4)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000004"]


def test_checkpoints_of_an_abandoned_future_are_set_aside_not_loaded_and_not_lost(tmp_path):
    keeper = CheckpointManager(tmp_path, keep=3)
    for step in (2, 4, 6):
        keeper.save(step, parts_of(step))
    CheckpointManager(tmp_path, keep=3).save(3, parts_of(3))
    assert_is(load_checkpoint(tmp_path), 3)
    assert (tmp_path / "superseded-step_000006-1").is_dir()
    assert_is(load_checkpoint(tmp_path / "superseded-step_000004-1"), 4)


def test_leftovers_of_a_killed_save_are_ignored_and_cleaned_by_the_next(tmp_path):
    keeper = CheckpointManager(tmp_path, keep=3)
    keeper.save(1, parts_of(1))
    left = tmp_path / f"{manager._UNFINISHED}step_000002"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert_is(keeper.load(), 1)
    keeper.save(2, parts_of(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_a_replacement_cut_off_between_its_renames_loses_nothing(tmp_path):
    keeper = CheckpointManager(tmp_path, keep=1)
    path = keeper.save(5, parts_of(5))
    path.rename(tmp_path / f"{manager._REPLACED}{path.name}")
    assert_is(load_checkpoint(tmp_path), 5)
    keeper.clean()
    assert_is(load_checkpoint(path), 5)


def test_a_missing_part_is_an_error_that_names_the_parts_there_are(tmp_path):
    CheckpointManager(tmp_path, keep=1).save(1, parts_of(1))
    with pytest.raises(CheckpointError, match="no part 'critic', only model, trainer"):
        load_checkpoint(tmp_path).part("critic")


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_place_without_checkpoints_is_an_error_with_the_flag(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "empty":
        place.mkdir()
    elif kind == "file":
        place.write_text("x")
    with pytest.raises(CheckpointError, match="--load") as caught:
        load_checkpoint(place)
    assert str(place) in str(caught.value)


@pytest.mark.parametrize("nth_write", range(10))
def test_a_disk_that_fills_up_at_any_write_leaves_older_checkpoints_intact(
    tmp_path, monkeypatch, nth_write
):
    keeper = CheckpointManager(tmp_path, keep=1)
    keeper.save(1, parts_of(1))
    before = listing(tmp_path)
    calls = 0
    real_fsync = os.fsync

    def fsync_of_a_full_disk(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > nth_write % 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync_of_a_full_disk)
    with pytest.raises(CheckpointError) as caught:
        keeper.save(2, parts_of(2))
    monkeypatch.undo()
    assert calls > nth_write % 6, "the fault fired"
    message = str(caught.value)
    assert "the disk is full" in message and "are free" in message and "--save" in message
    assert str(tmp_path) in message and "step 2" in message
    assert listing(tmp_path) == before
    keeper.save(3, parts_of(3))
    assert_is(keeper.load(), 3)


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    keeper = CheckpointManager(tmp_path, keep=1)
    monkeypatch.setattr(manager, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(CheckpointError, match=r"needs 1\.0 MB, 1000 B are free"):
        keeper.save(1, parts_of(1))
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def tiny_file_system(path: Path, size: str, read_only: bool = False):
    path.mkdir(exist_ok=True)
    options = f"size={size}" + (",ro" if read_only else "")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True, capture_output=True)


def test_a_really_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    with tiny_file_system(tmp_path / "disk", "4m") as disk:
        keeper = CheckpointManager(disk, keep=2)
        big = {"model": ({"w": torch.ones(600, 1000)}, {})}
        keeper.save(1, big)
        # Room is checked first; here it is taken away after that check.
        monkeypatch.setattr(manager, "free_bytes", lambda path: 1 << 40)
        for step in range(2, 12):
            with pytest.raises(CheckpointError, match="the disk is full"):
                keeper.save(step, big)
            assert [p.name for p in disk.iterdir()] == ["step_000001"]
        assert keeper.load().step == 1


def test_a_read_only_directory_is_an_error_and_its_checkpoints_can_be_read(tmp_path):
    with tiny_file_system(tmp_path / "disk", "4m") as disk:
        keeper = CheckpointManager(disk, keep=2)
        keeper.save(1, parts_of(1))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for step in range(2, 12):
            with pytest.raises(CheckpointError, match="can't be written") as caught:
                keeper.save(step, parts_of(step))
            assert "Read-only file system" in str(caught.value)
        assert_is(keeper.load(), 1)


def test_an_interrupt_during_a_save_leaves_nothing_half_written(tmp_path, monkeypatch):
    keeper = CheckpointManager(tmp_path, keep=1)
    keeper.save(1, parts_of(1))

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        keeper.save(2, parts_of(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_a_save_without_room_for_tidying_still_counts(tmp_path, monkeypatch, caplog):
    keeper = CheckpointManager(tmp_path, keep=1)
    keeper.save(1, parts_of(1))

    def failing(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(manager, "_checkpoints", failing)
    keeper.save(2, parts_of(2))
    monkeypatch.undo()
    assert "could not be removed" in caplog.text
    assert_is(keeper.load(), 2)
