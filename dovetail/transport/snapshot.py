"""Weights for engines in other processes: a directory per version, whole or not there.

    <place>/000007/                                version 7: safetensors, and links to the common
        dovetail_weights.json                      files: sizes, and on a disk digests

In memory the safetensors are links to segments, which are written again when nobody needs their
version any more. A version is kept until `retire` says that nobody does; the last one stays, for
engines that start later.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.transport.place import COMMON, MANIFEST, Place, Wanted, gb, other_place
from dovetail.transport.segments import Segments
from dovetail.transport.tensor_files import (
    NamedTensors,
    StreamedFile,
    TensorFile,
    tensor_digest,
)
from dovetail.types.errors import EngineError
from dovetail.types.weights import Snapshot

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
_ASIDE, _SEGMENTS = ".writing", ".segments"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SnapshotStore:
    """Writes versions of the weights where engines read them. A `transport.sender.Sender`.

    Args:
        wanted: where to, and how much it will be.
        model_dir: Hugging Face directory whose configuration and tokenizer lie beside the weights.
        written: called with the directory of each version, before any engine learns of it.

    Raises:
        ConfigError: there is no such place, or too little space.
    """

    meets = False

    def __init__(
        self,
        wanted: Wanted,
        model_dir: Path,
        written: Callable[[Path], None] | None = None,
    ) -> None:
        self._place = Place(wanted, model_dir)
        self.in_memory, self.directory = self._place.in_memory, self._place.directory
        self._wanted, self._written = wanted, written
        self._kept: dict[int, Snapshot] = {}
        self._segments: Segments | None = None
        if self.in_memory:
            self._segments = Segments(
                self.directory / _SEGMENTS,
                wanted.bucket_bytes,
                wanted.num_bytes,
                reuse=wanted.locks,
            )

    def announce(self, version: int, num_engines: int) -> Snapshot:
        """Engines need not be there while it is written."""
        raise AssertionError("files wait for whoever reads them")

    def send(self, version: int, tensors: NamedTensors) -> Snapshot:
        """As `write`."""
        return self.write(version, tensors)

    def write(self, version: int, tensors: NamedTensors) -> Snapshot:
        """A directory with these tensors under their names, each once. Blocks.

        Raises:
            EngineError: it can't be written in full; nothing of it is left.
        """
        started = time.perf_counter()
        aside, target = self.directory / _ASIDE, self.directory / f"{version:06d}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            num_bytes, digests = self._write_all(aside, version, tensors)
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
        except OSError as error:
            raise self._failed(version, error) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        snapshot = self._kept[version] = Snapshot(version, target, num_bytes, digests=digests)
        if self._written is not None:
            self._written(target)
        seconds = time.perf_counter() - started
        log.info("weights of version %d: %d bytes in %.2f s", version, num_bytes, seconds)
        return snapshot

    def retire(self, before: int) -> None:
        """Remove every version before this one: all engines have it, or a later one."""
        for version in [one for one in self._kept if one < before]:
            directory = self._kept.pop(version).directory
            assert directory is not None, "versions here are directories"
            shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        """Remove everything. A second call does nothing."""
        self._kept.clear()
        if self._segments is not None:
            self._segments.close()
            self._segments = None
        self._place.close()

    def _write_all(
        self, aside: Path, version: int, tensors: NamedTensors
    ) -> tuple[int, dict[str, str] | None]:
        aside.mkdir()
        weight_map: dict[str, str] = {}
        files: dict[str, dict[str, object]] = {}
        digests: dict[str, str] | None = {} if self._wanted.digests else None
        num_bytes = 0
        if self._segments is not None:
            # What is written twice is another version: nobody may find the old one changed.
            self._segments.begin(version, set(self._kept))
        for name, file in self._files(aside, tensors, digests):
            size, digest = file.finish(version)
            files[name] = {"size_bytes": size, "sha256": digest}
            weight_map.update(dict.fromkeys(file.layout.entries, name))
            num_bytes += file.layout.num_bytes
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (aside / INDEX).write_text(json.dumps(index), encoding="utf-8")
        for path in (self.directory / COMMON).iterdir():
            os.link(path, aside / path.name)
        about = {"version": version, "num_bytes": num_bytes, "files": files}
        manifest = {**about, **self._facts(version)}
        (aside / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        return num_bytes, digests

    def _files(self, aside: Path, tensors: NamedTensors, digests: dict[str, str] | None) -> Any:
        """Each file with its name, when nothing more goes into it."""
        file: TensorFile | None = None
        name, number = "", 0
        try:
            for tensor_name, tensor in tensors:
                if file is not None and not file.layout.takes(tensor_name, tensor):
                    yield name, file
                    file = None
                if file is None:
                    number += 1
                    name = f"model-{number:05d}.safetensors"
                    file = self._open(aside / name, number - 1, tensor)
                file.put(tensor_name, tensor)
                if digests is not None:
                    digests[tensor_name] = tensor_digest(tensor)
            if file is not None:
                done, file = file, None
                yield name, done
        finally:
            if file is not None:
                file.drop()

    def _open(self, path: Path, number: int, first: torch.Tensor) -> TensorFile:
        if self._segments is None:
            return StreamedFile(path, max(self._wanted.bucket_bytes, first.nbytes))
        file = self._segments.file(number, first.nbytes)
        os.link(file.path, path)
        return file

    def _facts(self, version: int) -> dict[str, Any]:
        """What else the manifest says."""
        return {}

    def _failed(self, version: int, error: OSError) -> EngineError:
        free = shutil.disk_usage(self.directory).free
        why = f"{error.strerror or error}, {gb(free)} are free"
        if error.errno in _FULL and self._wanted.num_bytes:
            why += f"; one version needs {gb(self._wanted.num_bytes)}, and two are kept for a time"
        return EngineError(
            f"the weights of version {version} can't be written to {self.directory}: {why}; "
            f"{other_place()}"
        )
