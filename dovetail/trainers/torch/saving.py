"""Training state in the shards in which ranks hold it: safetensors and JSON only.

Written and read through torch.distributed.checkpoint with its safetensors storage: every rank
writes one file, whose header says which part of each tensor it holds, so that any number of ranks
in any layout can read what they need. There is no `.metadata` file, which would be a pickle.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from dovetail.types.errors import CheckpointError

FORMAT = "dovetail-torch-shards-1"
"""In the facts of a saved state: only such a one is read."""


class ShardFiles:
    """Writes and reads states; all ranks of `group` call it alike. None: this rank is alone."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._ranks = None if group is None else dist.get_process_group_ranks(group)
        self._group: dist.ProcessGroup | None = None
        self._writing: Future[Any] | None = None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """One of its own: a save in the background talks while training does."""
        if self._ranks is not None and self._group is None:
            self._group = dist.new_group(self._ranks, backend="gloo")
        return self._group

    def write(
        self, directory: Path, tensors: Mapping[str, torch.Tensor], in_background: bool
    ) -> None:
        """Write this rank's shards. In the background: come back when they are copied.

        Raises:
            CheckpointError: a file can't be written, on whichever rank.
        """
        # How an earlier one went, whoever began it has asked or does not want to know.
        wait([self._writing] if self._writing else [])
        self._writing = None
        group = self.group
        how: dict[str, Any] = {
            "storage_writer": HuggingFaceStorageWriter(str(directory), save_distributed=True),
            "process_group": group,
            "no_dist": group is None,
        }
        state = {name: tensor.detach() for name, tensor in tensors.items()}
        if in_background:
            self._writing = _behind(state, how)
            return
        try:
            with _quiet():
                dcp.save(state, **how)
        except (CheckpointException, OSError) as error:
            raise _not_written(directory, error) from error

    @property
    def done(self) -> bool:
        """Whether nothing is being written in the background, by this rank."""
        return self._writing is None or self._writing.done()

    def finish(self) -> None:
        """Wait for what is written in the background.

        Raises:
            CheckpointError: it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (CheckpointException, OSError) as error:
            raise _not_written(None, error) from error

    def read(self, directory: Path, into: Mapping[str, torch.Tensor]) -> None:
        """Fill these tensors, in place, each with the part of the saved one that it is.

        Raises:
            CheckpointError: one is missing or has another shape, or a file is damaged.
        """
        try:
            with _quiet():
                dcp.load(
                    {name: tensor.detach() for name, tensor in into.items()},
                    storage_reader=HuggingFaceStorageReader(str(directory)),
                    process_group=self.group,
                    no_dist=self.group is None,
                )
        # Damaged files raise what safetensors, json and the planner happen to raise, and torch
        # collects it in a BaseException.
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"the trainer's state in {directory} can't be read: {_reason(error)}; it is "
                "damaged or of another model (--hf-checkpoint, TOML: model.hf_checkpoint)"
            ) from error

    def read_whole(self, directory: Path, prefix: str) -> dict[str, torch.Tensor]:
        """The saved tensors whose names begin so, whole, in this process.

        Raises:
            CheckpointError: a file is damaged.
        """
        try:
            found = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
        # Damaged files raise what safetensors and json happen to raise.
        except Exception as error:
            raise CheckpointError(
                f"the trainer's state in {directory} can't be read: {_reason(error)}"
            ) from error
        whole = {
            name: torch.empty(told.size, dtype=told.properties.dtype)  # type: ignore[union-attr]
            for name, told in found.items()
            if name.startswith(prefix)
        }
        self.read(directory, whole)
        return whole


def check_format(facts: Mapping[str, Any], expected: str, what: str) -> None:
    """Refuse a state that another kind of backend saved.

    Raises:
        CheckpointError: it is one.
    """
    if facts.get("format") != expected:
        raise CheckpointError(
            f"the checkpoint's trainer state is {facts.get('format')!r}, {what} reads {expected!r};"
            " continue with the --train-backend (TOML: trainer.train_backend) that wrote it, or "
            "start from its export (dovetail convert) as --hf-checkpoint"
        )


def _behind(state: Mapping[str, torch.Tensor], how: Mapping[str, Any]) -> Future[Any]:
    """Copy a state, and write the copy in a thread."""
    if how["process_group"] is not None:
        started = dcp.async_save(dict(state), **how)
        assert isinstance(started, Future)
        return started
    copied = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
    thread = ThreadPoolExecutor(1, thread_name_prefix="saving")

    def write() -> None:
        with _quiet():
            dcp.save(copied, **how)

    writing = thread.submit(write)
    thread.shutdown(wait=False)
    return writing


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One rank alone is meant: torch warns that it is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _not_written(directory: Path | None, error: BaseException) -> CheckpointError:
    place = "" if directory is None else f" to {directory}"
    return CheckpointError(f"the trainer's state was not written{place}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """The first rank's error, in one line: torch's own message repeats tracebacks."""
    failures: Iterable[Any] = getattr(error, "failures", {}).values()
    inner = next((pair[0] for pair in failures), error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {(lines or [''])[0][:300]}"
