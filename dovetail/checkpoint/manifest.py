"""The manifest of a checkpoint: size and hash of every file, and a hash of itself.

It is written last, so a directory without one was never finished. Its bytes must be exactly those
that its content encodes to: no byte of it can change unseen.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.checkpoint.files import HASH, FileFacts, digest_of, readable_bytes
from dovetail.checkpoint.state import FACTS_SUFFIX, TENSORS_SUFFIX

MANIFEST = "manifest.json"
FORMAT = "dovetail-checkpoint"
FORMAT_VERSION = 1
_MOST_BYTES = 16 << 20
FORMAT_VERSION_OF_WRITTEN = 2
"""Of checkpoints with a part that wrote itself."""
_PART_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,63}")
_INNER = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")  # Megatron writes `.metadata`.
_MOST_DEPTH = 8
_HEX = re.compile(r"[0-9a-f]{64}")


class Damaged(ValueError):
    """A directory is not a whole checkpoint; the message says which file and how."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says about itself."""

    step: int
    files: Mapping[str, FileFacts]

    @property
    def parts(self) -> list[str]:
        """Names of the parts, sorted."""
        names = (name for name in self.files if "/" not in name)
        return sorted(n.removesuffix(FACTS_SUFFIX) for n in names if n.endswith(FACTS_SUFFIX))

    @property
    def written_parts(self) -> list[str]:
        """Names of the parts that wrote themselves, each into a directory of its name, sorted."""
        return sorted({name.partition("/")[0] for name in self.files if "/" in name})

    def encode(self) -> bytes:
        """The bytes of the manifest file."""
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION_OF_WRITTEN if self.written_parts else FORMAT_VERSION,
            "step": self.step,
            "hash": HASH,
            "files": {n: [f.size_bytes, f.digest] for n, f in sorted(self.files.items())},
        }
        digest = hashlib.new(HASH, _dump(body)).hexdigest()
        return _dump({**body, "digest": digest})


def is_part_name(name: str) -> bool:
    """Whether `name` can name a part: letters, digits, `_` and `-`, but not `manifest`."""
    return bool(_PART_NAME.fullmatch(name)) and name + FACTS_SUFFIX != MANIFEST


def is_written_name(name: str) -> bool:
    """Whether `part/...` can name a file of a part that wrote itself: plain names, no way out."""
    part, *inner = name.split("/")
    return (
        is_part_name(part)
        and 0 < len(inner) <= _MOST_DEPTH
        and all(_INNER.fullmatch(one) for one in inner)
    )


def read_manifest(directory: Path) -> Manifest:
    """Parse the manifest of `directory` and check it against its own hash.

    Raises:
        Damaged: it is missing, not a manifest, changed, or names files it may not name.
    """
    raw = _read_raw(directory / MANIFEST)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is not readable JSON ({_short(error)})") from error
    if not (isinstance(body, dict) and body.get("format") == FORMAT):
        raise Damaged(f"{MANIFEST} is not the manifest of a checkpoint of ours")
    if body.get("format_version") not in (FORMAT_VERSION, FORMAT_VERSION_OF_WRITTEN):
        raise Damaged(
            f"{MANIFEST} has format version {body.get('format_version')!r}, "
            f"this version of dovetail reads {FORMAT_VERSION} and {FORMAT_VERSION_OF_WRITTEN}"
        )
    step, files = body.get("step"), body.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict):
        raise Damaged(f"{MANIFEST} has no step or no list of files")
    manifest = Manifest(step, {name: _file_facts(name, entry) for name, entry in files.items()})
    if manifest.encode() != raw:
        raise Damaged(f"{MANIFEST} was changed after it was written: its own hash does not fit")
    _check_pairs(manifest)
    return manifest


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Check that each file is there as a regular file of its size; contents are not read.

    Raises:
        Damaged: the first one that is not.
    """
    for name, facts in manifest.files.items():
        try:
            found = (directory / name).lstat()
        except OSError as error:
            raise Damaged(f"{name} is missing ({_short(error)})") from error
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{name} is not a regular file")
        if found.st_size != facts.size_bytes:
            raise Damaged(
                f"{name} has {readable_bytes(found.st_size)} ({found.st_size} bytes), "
                f"{facts.size_bytes} bytes were written"
            )


def check_contents(directory: Path, manifest: Manifest) -> None:
    """Check sizes, then read every file and compare its hash.

    Raises:
        Damaged: the first file that is not as it was written.
    """
    check_sizes(directory, manifest)
    for name, facts in manifest.files.items():
        try:
            digest = digest_of(directory / name)
        except OSError as error:
            raise Damaged(f"{name} can't be read ({_short(error)})") from error
        if digest != facts.digest:
            raise Damaged(f"{name} has changed since it was written: its {HASH} does not fit")


def _read_raw(path: Path) -> bytes:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{MANIFEST} is not a regular file")
        if found.st_size > _MOST_BYTES:
            raise Damaged(f"{MANIFEST} has {readable_bytes(found.st_size)}, too large for one")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST} is missing: it was never finished, or was removed") from error
    except OSError as error:
        raise Damaged(f"{MANIFEST} can't be read ({_short(error)})") from error


def _file_facts(name: str, entry: Any) -> FileFacts:
    stem = name.removesuffix(TENSORS_SUFFIX).removesuffix(FACTS_SUFFIX)
    if not is_written_name(name) and (name == stem or not is_part_name(stem)):
        raise Damaged(f"{MANIFEST} names the file {name[:80]!r}, which no checkpoint contains")
    match entry:
        case [int() as size_bytes, str() as digest] if size_bytes >= 0 and _HEX.fullmatch(digest):
            return FileFacts(size_bytes, digest)
    raise Damaged(f"{MANIFEST} has no size and hash for {name}")


def _check_pairs(manifest: Manifest) -> None:
    written = set(manifest.written_parts)
    expected = {p + FACTS_SUFFIX for p in {*manifest.parts, *written}}
    expected |= {p + TENSORS_SUFFIX for p in manifest.parts if p not in written}
    if not expected or {name for name in manifest.files if "/" not in name} != expected:
        raise Damaged(f"{MANIFEST} does not list a tensor file and a fact file for each part")


def _dump(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1).encode() + b"\n"


def _short(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:120]
