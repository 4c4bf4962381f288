"""Checkpoints that are whole or absent: written aside, verified when read, the newest few kept.

    save:  encode -> room on the disk? -> write aside, hash, fsync -> manifest -> fsync
           (a part that writes itself, as the ranks of a trainer do, gets a directory aside)
           `begin` is all before the manifest, `commit` the rest: between the two others may write
           -> rename -> fsync -> set checkpoints of an abandoned future aside
           -> remove all but the newest `keep` good ones
    load:  newest first: manifest and every hash fit? -> parts;  else say why and take the next

A process killed at any moment leaves either the new checkpoint or all the old ones, and at most one
unfinished directory, which the next save removes.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.checkpoint.files import (
    FileFacts,
    free_bytes,
    put_in_place,
    remove_tree,
    write_file,
    writing_failed,
    written_files,
)
from dovetail.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    Manifest,
    check_contents,
    check_sizes,
    is_part_name,
    is_written_name,
    read_manifest,
)
from dovetail.checkpoint.state import (
    FACTS_SUFFIX,
    TENSORS_SUFFIX,
    EncodedPart,
    decode_facts,
    decode_part,
    encode_part,
)
from dovetail.observe.atomic import fsync_directory
from dovetail.observe.run_dir import checkpoints_at
from dovetail.types.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Part = tuple[Mapping[str, "torch.Tensor"], Mapping[str, Any]]
"""Tensors by name, and facts that JSON can hold."""
WritingPart = Callable[[Path], Mapping[str, Any]]
"""Writes files into an empty directory, and gives facts that JSON can hold."""

log = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step_(\d+)")
_UNFINISHED = ".unfinished-"
_REPLACED = ".replaced-"
_SUPERSEDED = "superseded-"
_MARGIN_BYTES = 1 << 20
"""For the manifest and for the file system's own blocks."""
_CURE = (
    "Earlier checkpoints are untouched. Free space, or choose another directory "
    "(--save, TOML: checkpoint.save), or keep fewer (--save-keep, TOML: checkpoint.save_keep)."
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    step: int
    parts: Mapping[str, Part]
    path: Path
    skipped: list[str] = field(default_factory=list)
    """Why each newer checkpoint was passed over: `path: reason`."""
    written: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Facts of the parts that wrote themselves; `directory` has their files."""

    def directory(self, name: str) -> Path:
        """Where the part `name` wrote itself."""
        return self.path / name

    def part(self, name: str) -> Part:
        """Tensors and facts of one part.

        Raises:
            CheckpointError: the checkpoint has no such part.
        """
        if name in self.written:
            raise CheckpointError(
                f"checkpoint {self.path} has part '{name}' as ranks of a trainer wrote it, in "
                f"{self.directory(name)}: it has to be read from there"
            )
        if name not in self.parts:
            has = ", ".join([*self.parts, *self.written])
            raise CheckpointError(
                f"checkpoint {self.path} has no part '{name}', only {has}; "
                "it was saved by a run of another kind. Choose another: --load (TOML: "
                "checkpoint.load)"
            )
        return self.parts[name]


@dataclass(frozen=True, slots=True)
class Begun:
    """A checkpoint that is written aside, and is none until it is committed."""

    step: int
    aside: Path
    files: Mapping[str, FileFacts]
    """Those that are whole already."""
    writing: Sequence[str]
    """Parts that write themselves."""
    needed: int
    """Bytes, of what is known."""


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` steps."""
    return f"step_{step:06d}"


class CheckpointManager:
    """The checkpoints of one run in one directory. Only one process saves into a directory."""

    def __init__(self, directory: Path | str, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = Path(directory)
        self.keep = keep
        self._verified: set[tuple[str, bytes]] = set()

    def save(self, step: int, parts: Mapping[str, Part | WritingPart]) -> Path:
        """Write the checkpoint after `step` steps and remove those that are too old.

        A checkpoint of the same step is replaced. Checkpoints of later steps belong to a future
        that this run left when it resumed earlier: they are kept under the name `superseded-...`.

        Raises:
            CheckpointError: it can't be written (disk full, no permission, ...). The older ones
                are as they were and nothing half-written is left: the run can go on. Or a part
                holds what can't be stored.
        """
        return self.commit(self.begin(step, parts))

    def begin(self, step: int, parts: Mapping[str, Part | WritingPart]) -> Begun:
        """Write everything of a checkpoint but its manifest. Parts that write themselves may come
        back before their files are there; `commit` is called when they are, and no other `begin`
        meanwhile.

        Raises:
            CheckpointError: as `save`.
        """
        if not parts or not all(is_part_name(name) for name in parts):
            raise ValueError(f"part names are letters, digits, _ and -, got {list(parts)}")
        encoded = {n: encode_part(n, *part) for n, part in parts.items() if not callable(part)}
        writing = {name: part for name, part in parts.items() if callable(part)}
        needed = sum(part.size_bytes for part in encoded.values()) + _MARGIN_BYTES
        aside = self.directory / f"{_UNFINISHED}{checkpoint_name(step)}"
        with self._whole_or_absent(step, aside, needed):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.clean()
            if free_bytes(self.directory) < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return Begun(step, aside, _write_aside(aside, encoded, writing), [*writing], needed)

    def commit(self, begun: Begun) -> Path:
        """Make it the newest checkpoint, and remove those that are too old.

        Raises:
            CheckpointError: as `save`.
        """
        final = self.directory / checkpoint_name(begun.step)
        with self._whole_or_absent(begun.step, begun.aside, begun.needed):
            manifest = _manifest(begun)
            put_in_place(begun.aside, final, final.with_name(f"{_REPLACED}{final.name}"))
        self._verified.add((final.name, manifest.encode()))
        self._tidy(begun.step)
        return final

    def drop(self, begun: Begun) -> None:
        """It will never be committed."""
        remove_tree(begun.aside)

    @contextmanager
    def _whole_or_absent(self, step: int, aside: Path, needed: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remove_tree(aside)
            what = f"checkpoint of step {step}"
            raise writing_failed(what, self.directory, error, needed, _CURE) from error
        except BaseException:
            remove_tree(aside)
            raise

    def load(self, path: Path | str | None = None) -> Checkpoint:
        """`load_checkpoint` of `path`, or of this manager's directory."""
        return load_checkpoint(self.directory if path is None else path)

    def is_empty(self) -> bool:
        """Whether no checkpoint was ever finished here, good or damaged."""
        return not self.directory.is_dir() or not _candidates(self.directory)

    def clean(self) -> None:
        """Remove what killed saves left, and undo a replacement cut off between its renames."""
        if not self.directory.is_dir():
            return
        for path in sorted(self.directory.iterdir()):
            if path.name.startswith(_UNFINISHED):
                remove_tree(path)
            elif path.name.startswith(_REPLACED):
                final = self.directory / path.name.removeprefix(_REPLACED)
                if final.exists():
                    remove_tree(path)
                else:
                    path.rename(final)

    def _tidy(self, newest: int) -> None:
        try:
            for step, path in _checkpoints(self.directory):
                if step > newest:
                    _set_aside(path)
            self._prune()
        # The new checkpoint is good; one that is too many costs only space.
        except OSError as error:
            log.warning("old checkpoints in %s could not be removed: %s", self.directory, error)

    def _prune(self) -> None:
        good = 0
        for _, path in _checkpoints(self.directory):
            if good >= self.keep:
                remove_tree(path)
            elif self._is_good(path):
                good += 1

    def _is_good(self, path: Path) -> bool:
        """Whether it may count as kept. Contents are read once per process, sizes every time."""
        try:
            manifest = read_manifest(path)
            key = (path.name, manifest.encode())
            if key in self._verified:
                check_sizes(path, manifest)
            else:
                check_contents(path, manifest)
        except Damaged:
            return False
        self._verified.add(key)
        return True


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read one checkpoint, or the newest whole one of a directory of them or of a run directory.

    Every size and hash is verified first. A damaged checkpoint is passed over for the next older
    one, and `skipped` says why.

    Raises:
        CheckpointError: there is none, or none is whole; the message has the reason for each.
    """
    path = checkpoints_at(path)
    if not path.is_dir():
        reason = "it is not a directory" if path.exists() else "it does not exist"
        raise CheckpointError(
            f"no checkpoint at {path}: {reason}. "
            "Give a checkpoint or a directory of checkpoints to --load (TOML: checkpoint.load)"
        )
    skipped: list[str] = []
    for candidate in _candidates(path):
        try:
            found = _read(candidate)
        except (Damaged, ValueError, OSError) as error:
            skipped.append(f"{candidate}: {error}")
            continue
        return replace(found, skipped=skipped)
    if not skipped:
        raise CheckpointError(
            f"no checkpoint in {path}: expected directories like {checkpoint_name(1)}, each with "
            f"{MANIFEST}. Give another directory to --load (TOML: checkpoint.load)"
        )
    raise CheckpointError(
        f"no whole checkpoint in {path}; give another directory to --load (TOML: "
        "checkpoint.load):\n  " + "\n  ".join(skipped)
    )


def directory_of_checkpoints(path: Path | str) -> Path:
    """The directory that holds the checkpoint `path`, or the checkpoints of the run `path`."""
    path = checkpoints_at(path)
    is_one = (path / MANIFEST).exists() or _STEP_NAME.fullmatch(path.name)
    return path.parent if is_one else path


def _candidates(path: Path) -> list[Path]:
    if (path / MANIFEST).exists() or _STEP_NAME.fullmatch(path.name):
        return [path]
    found = _checkpoints(path)
    names = {p.name for _, p in found}
    for cut_off in path.glob(f"{_REPLACED}*"):
        name = cut_off.name.removeprefix(_REPLACED)
        if (match := _STEP_NAME.fullmatch(name)) and name not in names:
            found.append((int(match[1]), cut_off))
    return [p for _, p in sorted(found, reverse=True)]


def _read(path: Path) -> Checkpoint:
    manifest = read_manifest(path)
    named = _STEP_NAME.fullmatch(path.name.removeprefix(_REPLACED))
    if named and int(named[1]) != manifest.step:
        raise Damaged(f"its manifest is that of step {manifest.step}")
    check_contents(path, manifest)
    written = manifest.written_parts
    return Checkpoint(
        manifest.step,
        {name: decode_part(path, name) for name in manifest.parts if name not in written},
        path,
        written={name: decode_facts(path, name) for name in written},
    )


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Steps and paths of everything named like a checkpoint, newest first."""
    found = [
        (int(match[1]), path)
        for path in directory.iterdir()
        if (match := _STEP_NAME.fullmatch(path.name))
    ]
    return sorted(found, reverse=True)


def _write_aside(
    aside: Path, parts: Mapping[str, EncodedPart], writing: Mapping[str, WritingPart]
) -> dict[str, FileFacts]:
    files: dict[str, FileFacts] = {}
    aside.mkdir()
    for name, part in parts.items():
        tensors, facts = f"{name}{TENSORS_SUFFIX}", f"{name}{FACTS_SUFFIX}"
        files[tensors] = write_file(aside / tensors, part.tensor_chunks())
        files[facts] = write_file(aside / facts, [part.facts])
    for name, write in writing.items():
        own = aside / name
        own.mkdir()
        facts = f"{name}{FACTS_SUFFIX}"
        files[facts] = write_file(aside / facts, [encode_part(name, {}, write(own)).facts])
    return files


def _manifest(begun: Begun) -> Manifest:
    files = dict(begun.files)
    for name in begun.writing:
        files |= _written_aside(begun.aside, name)
    manifest = Manifest(begun.step, files)
    write_file(begun.aside / MANIFEST, [manifest.encode()])
    fsync_directory(begun.aside)
    return manifest


def _written_aside(aside: Path, name: str) -> dict[str, FileFacts]:
    found = {f"{name}/{inner}": about for inner, about in written_files(aside / name).items()}
    wrong = [path for path in found if not is_written_name(path)]
    if wrong or not found:
        raise CheckpointError(f"part '{name}' wrote {wrong or 'nothing'}, which no manifest holds")
    return found


def _set_aside(path: Path) -> None:
    number = 1
    while (target := path.with_name(f"{_SUPERSEDED}{path.name}-{number}")).exists():
        number += 1
    path.rename(target)
    log.warning("%s is of a later step than this run: kept as %s", path, target.name)
