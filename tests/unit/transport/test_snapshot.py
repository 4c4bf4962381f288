"""Weights on their way: written once, whole or not there, and gone when the run is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dovetail.transport import place as module
from dovetail.transport.place import Wanted, clear_leftovers
from dovetail.transport.receive import SnapshotReader, check_whole, is_snapshot, read_snapshot
from dovetail.transport.snapshot import SnapshotStore
from dovetail.types import ConfigError, EngineError


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "qwen3"}')
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"old weights")
    (path / "model.safetensors.index.json").write_text("{}")
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def _tensors(version: int) -> dict[str, torch.Tensor]:
    made = torch.arange(12.0).reshape(3, 4) + version
    return {
        "flag": torch.tensor(True),
        "half": made.to(torch.bfloat16),
        "rows": made[1:3],
        "turned": made.T,
        "scalar": torch.tensor(version),
        "none": torch.empty(0, 4),
    }


def _store(disk: Path, model_dir: Path, **changes: Any) -> SnapshotStore:
    return SnapshotStore(Wanted("disk", disk, **changes), model_dir)


def test_what_is_written_is_what_is_read_by_us_and_by_the_library(
    disk: Path, model_dir: Path
) -> None:
    store = _store(disk, model_dir, bucket_bytes=60)
    try:
        made = store.write(3, _tensors(3).items())
        own = dict(read_snapshot(made.directory))
        files = sorted(made.directory.glob("*.safetensors"))
        assert len(files) > 1
        library = {name: value for file in files for name, value in load_file(file).items()}
        for found in (own, library):
            assert found.keys() == _tensors(3).keys()
            for name, value in _tensors(3).items():
                assert found[name].dtype == value.dtype
                assert torch.equal(found[name], value)
        assert (made.version, check_whole(made.directory)) == (3, 3)
        assert made.num_bytes == sum(value.nbytes for value in _tensors(3).values())
        index = json.loads((made.directory / "model.safetensors.index.json").read_text())
        assert {made.directory / name for name in index["weight_map"].values()} == set(files)
    finally:
        store.close()


def test_configuration_and_tokenizer_lie_beside_the_weights(disk: Path, model_dir: Path) -> None:
    store = _store(disk, model_dir)
    try:
        made = store.write(1, _tensors(1).items())
        assert (made.directory / "config.json").read_text() == '{"model_type": "qwen3"}'
        assert (made.directory / "tokenizer.json").is_file()
        assert not (made.directory / "model.safetensors").exists()
    finally:
        store.close()


def test_a_version_stays_until_it_is_retired_and_nothing_stays_after_the_close(
    disk: Path, model_dir: Path
) -> None:
    store = _store(disk, model_dir)
    try:
        first = store.write(1, _tensors(1).items())
        second = store.write(2, _tensors(2).items())
        assert is_snapshot(first.directory)
        store.retire(2)
        assert not first.directory.exists()
        assert check_whole(second.directory) == 2
    finally:
        store.close()
    assert list(disk.iterdir()) == []
    store.close()


def test_a_version_written_twice_is_the_second(disk: Path, model_dir: Path) -> None:
    store = _store(disk, model_dir)
    try:
        store.write(1, _tensors(5).items())
        again = store.write(1, _tensors(6).items())
        assert dict(read_snapshot(again.directory))["scalar"] == 6
    finally:
        store.close()


def _damage_byte(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_damage_byte, _cut, Path.unlink])
def test_damaged_weights_are_refused_by_the_receiver(
    disk: Path, model_dir: Path, damage: Any
) -> None:
    store = _store(disk, model_dir)
    try:
        made = store.write(1, _tensors(1).items())
        damage(made.directory / "model-00001.safetensors")
        with pytest.raises(EngineError, match="model-00001"):
            check_whole(made.directory)
        with pytest.raises(EngineError):
            list(read_snapshot(made.directory))
    finally:
        store.close()


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b'{"version": 1}',
        b'{"version": 1, "files": {"../../etc/passwd": {"size_bytes": 1, "sha256": null}}}',
        b'{"version": "1", "files": {}}',
        b'{"version": 1, "files": {"a": 3}}',
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, manifest: bytes) -> None:
    (tmp_path / module.MANIFEST).write_bytes(manifest)
    with pytest.raises(EngineError):
        check_whole(tmp_path)


def test_a_write_that_fails_leaves_the_last_version_and_nothing_of_its_own(
    disk: Path, model_dir: Path
) -> None:
    store = _store(disk, model_dir)

    def broken() -> Any:
        yield from _tensors(2).items()
        raise OSError(28, "No space left on device")

    try:
        first = store.write(1, _tensors(1).items())
        with pytest.raises(EngineError, match=r"version 2 can't be written.*No space left"):
            store.write(2, broken())
        assert check_whole(first.directory) == 1
        names = sorted(path.name for path in store.directory.iterdir())
        assert names == [".lock", "000001", "common"]
    finally:
        store.close()


def test_tensors_of_many_buckets_never_lie_in_memory_twice(disk: Path, model_dir: Path) -> None:
    store = _store(disk, model_dir, bucket_bytes=4 << 20)
    weights = {f"layer.{i}": torch.zeros(1 << 20) for i in range(16)}
    try:
        tracemalloc.start()
        store.write(1, weights.items())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        store.close()
    assert peak < 1 << 20


def test_shared_memory_is_taken_where_it_is_enough_and_has_no_digests(
    model_dir: Path, disk: Path
) -> None:
    store = SnapshotStore(Wanted("auto", disk, num_bytes=1 << 10), model_dir)
    try:
        assert store.directory.parent == module.SHARED_MEMORY
        made = store.write(1, _tensors(1).items())
        manifest = json.loads((made.directory / module.MANIFEST).read_text())
        assert {facts["sha256"] for facts in manifest["files"].values()} == {None}
        assert check_whole(made.directory) == 1
        assert store.directory.stat().st_mode & 0o077 == 0
    finally:
        store.close()
    assert not store.directory.exists()


def test_auto_goes_to_the_disk_where_shared_memory_is_too_small(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, disk: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path / "not there")
    store = SnapshotStore(Wanted("auto", disk, num_bytes=1 << 10), model_dir)
    store.close()
    assert store.directory.parent == disk


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted("disk", None),
        Wanted("auto", None, local=False),
        Wanted("shared_memory", None, num_bytes=10**15),
        Wanted("auto", None, num_bytes=10**15),
        Wanted("disk", Path("/proc/no/such"), num_bytes=1),
    ],
)
def test_a_place_that_will_not_do_is_told_with_the_cure(wanted: Wanted, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="--update-weight-disk-dir"):
        SnapshotStore(wanted, model_dir)


KILLED = """
import os, sys, time
from pathlib import Path
import torch
from dovetail.transport.place import Wanted
from dovetail.transport.snapshot import SnapshotStore
store = SnapshotStore(Wanted("disk", Path(sys.argv[1])), Path(sys.argv[2]))
if len(sys.argv) > 3:
    store._place._janitor.kill()
store.write(1, [("a", torch.ones(8))])
print(store.directory, flush=True)
time.sleep(600)
"""


def _killed_run(disk: Path, model_dir: Path, *more: str) -> Path:
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(disk), str(model_dir), *more],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    directory = Path(run.stdout.readline().strip())
    assert (directory / "000001").is_dir()
    assert clear_leftovers(disk) == []
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return directory


def test_what_a_killed_run_wrote_is_gone_at_once(disk: Path, model_dir: Path) -> None:
    directory = _killed_run(disk, model_dir)
    deadline = time.monotonic() + 10
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not directory.exists()


def test_what_is_left_all_the_same_the_next_run_removes(disk: Path, model_dir: Path) -> None:
    directory = _killed_run(disk, model_dir, "without a janitor")
    assert directory.exists()
    store = _store(disk, model_dir)
    try:
        assert not directory.exists()
    finally:
        store.close()


def test_memory_is_written_again_when_nobody_reads_it_and_left_alone_while_somebody_does(
    model_dir: Path,
) -> None:
    store, reader = SnapshotStore(Wanted("shared_memory"), model_dir), SnapshotReader()
    try:
        inodes = []
        for version in range(1, 6):
            made = store.write(version, _tensors(version).items())
            assert made.directory is not None
            with reader.opened(made.directory) as found:
                assert found.tensors["scalar"] == version
            inodes.append((made.directory / "model-00001.safetensors").stat().st_ino)
            store.retire(version)
        assert inodes[2:] == [inodes[0], inodes[1], inodes[0]]
        with reader.opened(made.directory) as found:
            store.write(6, _tensors(6).items())
            store.retire(6)
            store.write(7, _tensors(7).items())
            # Version 5 has no name any more, and who reads it has it all the same.
            assert found.tensors["scalar"] == 5
    finally:
        store.close()


def test_who_comes_to_memory_too_late_is_told(model_dir: Path) -> None:
    store = SnapshotStore(Wanted("shared_memory"), model_dir)
    try:
        first = store.write(1, _tensors(1).items()).directory
        assert first is not None
        manifest = (first / module.MANIFEST).read_bytes()
        for version in (2, 3):
            store.retire(version)
            store.write(version, _tensors(version).items())
        again = store.directory / "000001"
        again.mkdir()
        (again / module.MANIFEST).write_bytes(manifest)
        for path in sorted((store.directory / "000003").glob("*.safetensors")):
            os.link(path, again / path.name)
        with pytest.raises(EngineError, match="no longer 1"):
            list(read_snapshot(again))
    finally:
        store.close()
