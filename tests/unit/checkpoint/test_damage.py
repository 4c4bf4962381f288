"""Whatever is wrong with the newest checkpoint, the one before is loaded and the reason said."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dovetail.checkpoint.files import FileFacts, digest_of
from dovetail.checkpoint.manager import CheckpointManager, load_checkpoint
from dovetail.checkpoint.manifest import Damaged, Manifest, read_manifest
from dovetail.types.errors import CheckpointError

FILES = ["manifest.json", "model.safetensors", "model.json", "rng.safetensors", "rng.json"]


def save(directory: Path, step: int) -> Path:
    tensors = {"w": torch.full((64,), float(step))}
    part = (tensors, {"step": step, "text": "fact"})
    return CheckpointManager(directory, keep=5).save(step, {"model": part, "rng": part})


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] ^= 0x04
    path.write_bytes(raw)


def shorten(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: shorten(path, 0),
    "half": lambda path: shorten(path, path.stat().st_size // 2),
    "one byte less": lambda path: shorten(path, path.stat().st_size - 1),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first byte flipped": lambda path: flip(path, 0),
    "a byte in the middle flipped": lambda path: flip(path, path.stat().st_size // 2),
    "last byte flipped": lambda path: flip(path, -1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


def assert_falls_back(directory: Path, *words: str) -> None:
    loaded = load_checkpoint(directory)
    assert loaded.step == 1
    assert loaded.part("model")[0]["w"].tolist() == [1.0] * 64
    assert loaded.part("rng")[1] == {"step": 1, "text": "fact"}
    assert len(loaded.skipped) == 1 and "step_000002" in loaded.skipped[0]
    for word in words:
        assert word in loaded.skipped[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damaged_file_is_noticed_and_named(tmp_path, name, damage):
    save(tmp_path, 1)
    DAMAGE[damage](save(tmp_path, 2) / name)
    assert_falls_back(tmp_path, name)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(tmp_path / "step_000002")


def test_every_single_flipped_byte_of_a_manifest_is_noticed(tmp_path):
    path = save(tmp_path, 1) / "manifest.json"
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good)
        flip(path, position)
        with pytest.raises(Damaged):
            read_manifest(path.parent)


def test_an_empty_directory_is_passed_over(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_000002").mkdir()
    assert_falls_back(tmp_path, "manifest.json is missing")


def test_a_file_in_place_of_a_checkpoint_is_passed_over(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_000002").write_text("x")
    assert_falls_back(tmp_path)


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 3).rename(tmp_path / "step_000002")
    assert_falls_back(tmp_path, "of step 3")


def test_several_damaged_checkpoints_are_all_named(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (2, 3, 4):
        (tmp_path / f"step_00000{step}" / "model.json").unlink()
    loaded = load_checkpoint(tmp_path)
    assert loaded.step == 1 and len(loaded.skipped) == 3


def test_without_any_whole_checkpoint_the_error_has_every_reason(tmp_path):
    (save(tmp_path, 1) / "model.json").unlink()
    flip(save(tmp_path, 2) / "rng.safetensors", -1)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    message = str(caught.value)
    assert "model.json is missing" in message and "rng.safetensors has changed" in message
    assert "--load" in message


def forge(directory: Path, change: Callable[[dict], object], resign: bool = True) -> None:
    """Change the manifest's content, as someone could who knows the format."""
    path = directory / "manifest.json"
    body = json.loads(path.read_bytes())
    change(body)
    if resign:
        facts = {n: FileFacts(*f) for n, f in body["files"].items()}
        path.write_bytes(Manifest(body["step"], facts).encode())
    else:
        path.write_bytes(json.dumps(body).encode())


HOSTILE_NAMES = [
    "../../outside.safetensors",
    "../step_000001/model.safetensors",
    "/etc/passwd",
    "..",
    "",
    "a/../b.json",
    "a\\b.json",
    "nul\0.json",
    ".hidden.json",
    "model.safetensors/../model.json",
    "x" * 300 + ".json",
    "weights.pkl",
    "code.py",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_manifest_may_not_name_files_outside_its_directory(tmp_path, name):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    entry = json.loads((path / "manifest.json").read_bytes())["files"]["model.json"]
    forge(path, lambda body: body["files"].update({name: entry}))
    assert_falls_back(tmp_path, "which no checkpoint contains")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(step=-1),
        lambda body: body.update(step="2"),
        lambda body: body.update(step=True),
        lambda body: body.update(step=9),
        lambda body: body.update(files=[]),
        lambda body: body.update(files={}),
        lambda body: body.update(format="other"),
        lambda body: body.update(format_version=2),
        lambda body: body["files"].update({"model.json": [1]}),
        lambda body: body["files"].update({"model.json": [-5, "0" * 64]}),
        lambda body: body["files"].update({"model.json": [10, "xyz"]}),
        lambda body: body["files"].pop("model.json"),
        lambda body: body.pop("digest"),
        lambda body: body.update(extra=1),
    ],
)
def test_a_manifest_with_wrong_content_is_refused(tmp_path, change):
    save(tmp_path, 1)
    forge(save(tmp_path, 2), change, resign=False)
    assert_falls_back(tmp_path, "manifest.json")


@pytest.mark.parametrize(
    "raw",
    [b"null", b"[]", b"5", b"{}", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b'{"format": NaN}'],
    ids=["null", "list", "number", "object", "bytes", "deep", "long number", "nan"],
)
def test_a_garbage_manifest_is_refused(tmp_path, raw):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_bytes(raw)
    assert_falls_back(tmp_path, "manifest.json")


def test_a_huge_manifest_is_not_read(tmp_path):
    save(tmp_path, 1)
    with open(save(tmp_path, 2) / "manifest.json", "wb") as file:
        file.truncate(1 << 40)
    assert_falls_back(tmp_path, "too large")


@pytest.mark.parametrize("name", FILES)
def test_symbolic_links_are_not_followed(tmp_path, name):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert_falls_back(tmp_path, "is not a regular file")


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / "model.json"
    file.unlink()
    os.mkfifo(file)
    assert_falls_back(tmp_path, "is not a regular file")


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BOMBS = {
    "header longer than the file": struct.pack("<Q", 1 << 62) + b"{}",
    "header of 99 MB announced": struct.pack("<Q", 99_000_000) + b"{}",
    "header length of zero": struct.pack("<Q", 0),
    "no header": b"\x01",
    "shape that overflows": header({"w": entry([1 << 40, 1 << 40], 0, 4)}) + bytes(4),
    "shape larger than the data": header({"w": entry([1 << 40], 0, 4)}) + bytes(4),
    "offsets beyond the file": header({"w": entry([1 << 40], 0, 1 << 42)}) + bytes(4),
    "negative offsets": header({"w": entry([1], -4, 0)}) + bytes(4),
    "offsets that overlap": header({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}) + bytes(4),
    "offsets with a hole": header({"a": entry([1], 4, 8)}) + bytes(8),
    "unknown dtype": header({"w": entry([1], 0, 4, "OBJ")}) + bytes(4),
    "bytes after the data": header({"w": entry([1], 0, 4)}) + bytes(400),
    "not JSON": struct.pack("<Q", 4) + b"\x80\x04N.",
    "deep JSON": struct.pack("<Q", 50_000) + b"[" * 50_000,
    "pickle": b"\x80\x04\x95\x17\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_tensor_file_with_a_fitting_hash_is_refused(tmp_path, bomb):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / "model.safetensors"
    file.write_bytes(BOMBS[bomb])
    facts = [file.stat().st_size, digest_of(file)]
    forge(path, lambda body: body["files"].update({file.name: facts}))
    assert_falls_back(tmp_path, "model.safetensors is not readable")


@pytest.mark.parametrize(
    "raw",
    [
        b"[]",
        b"{}",
        b'{"facts": 1, "aliases": {}}',
        b'{"facts": {}}',
        b'{"facts": {}, "aliases": {"a": "none"}}',
        b'{"facts": {}, "aliases": {"a": []}}',
        b"[" * 100_000,
        b"\xff",
    ],
    ids=str,
)
def test_a_hostile_fact_file_with_a_fitting_hash_is_refused(tmp_path, raw):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / "model.json"
    file.write_bytes(raw)
    facts = [file.stat().st_size, digest_of(file)]
    forge(path, lambda body: body["files"].update({file.name: facts}))
    assert_falls_back(tmp_path, "model.json")


def test_a_good_manifest_reads_back_as_it_was(tmp_path):
    manifest = read_manifest(save(tmp_path, 3))
    assert manifest.step == 3 and manifest.parts == ["model", "rng"]
    assert set(manifest.files) == set(FILES) - {"manifest.json"}
