"""Weights that an embedded engine takes into its own tensors: from files, all of them looked at
before one is written, or hand to hand, as they come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dovetail.checkpoint.hf_names import named_tensors
from dovetail.checkpoint.hf_weights import fitted, own_names, read_weights
from dovetail.transport.chain import arriving
from dovetail.transport.hand_over import handed_over
from dovetail.transport.receive import SnapshotReader, is_snapshot
from dovetail.types.errors import CheckpointError, EngineError

if TYPE_CHECKING:
    from dovetail.types.weights import Meeting

KEEPS = "The engine keeps the weights that it has"


class Reading:
    """Reads directories, one at a time, and knows what the engine holds of a chain of deltas."""

    def __init__(self, model: Callable[[], Any]) -> None:
        self._get_model, self._reader = model, SnapshotReader()
        self._state: str | None = None
        self._next: str | None = None
        self._open = contextlib.ExitStack()

    def begin(self, directory: Path) -> dict[str, torch.Tensor]:
        """Weights by the names of the model's parameters, valid until `end`: all, or those that
        changed since what is held.

        Raises:
            CheckpointError: the directory does not have this model's weights, whole.
            EngineError: they are not those that a run wrote there.
        """
        model = self._get_model()
        try:
            if not is_snapshot(directory):
                self._next = None
                return read_weights(directory, model, KEEPS)
            try:
                return self._read(directory, model, self._state)
            except EngineError:
                self.end()
                if self._state is None:
                    raise
                # What is held may be another than we believe; then everything is read.
                return self._read(directory, model, None)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"{directory} can't be read: {error.strerror}. {KEEPS}"
            ) from error

    def taken(self) -> None:
        """The engine has what `begin` gave."""
        self._state = self._next

    def forget(self) -> None:
        """What the engine holds is nothing that was read."""
        self._state = None

    def end(self) -> None:
        """Let go of the files."""
        self._open.close()

    def _read(self, directory: Path, model: Any, state: str | None) -> dict[str, torch.Tensor]:
        own, names = dict(model.named_parameters()), own_names(model)

        def held(name: str) -> torch.Tensor | None:
            return own.get(names.get(name, ""))

        plain = takes_one_by_one(model)
        coming = self._open.enter_context(
            arriving(self._reader, directory, state if plain else None, held)
        )
        self._next = coming.state
        found = dict(coming.tensors)
        if coming.whole:
            return fitted(found, model, f"the weights in {directory}", KEEPS)
        return {names[name]: tensor for name, tensor in found.items()}


def takes_one_by_one(model: Any) -> bool:
    """Whether each tensor of its files is one of the model's parameters."""
    names = own_names(model)
    return all(name in names for name, _ in named_tensors(model))


class Taken:
    """One update, in a pause of the engine.

    A model whose tensors have other names than its files (experts of a layer in one tensor) can't
    take them one by one: they are gathered first, and turned.
    """

    def __init__(self, model: Any, cure: str) -> None:
        self._model, self._cure = model, cure
        self._own = dict(model.named_parameters())
        self._names = own_names(model)
        self._missing = set(self._own)
        self.began = False
        """Whether one of the model's tensors may have been written."""

    def take(self, meeting: Meeting) -> Iterable[tuple[str, torch.Tensor]]:
        """What is left to be written when everything came. Blocks.

        Raises:
            BrokenUpdateError: not everything came.
            CheckpointError: it is another model's.
        """
        device = next(iter(self._own.values())).device
        found: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            if takes_one_by_one(self._model):
                for name, tensor in handed_over(meeting, device, self._check, self._complete):
                    self._write(name, tensor)
                return ()
            for name, tensor in handed_over(meeting, device, _anything, _nothing):
                found[name] = tensor.clone()
        return fitted(found, self._model, "the weights received", self._cure).items()

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        self.began = True
        own = self._names[name]
        self._own[own].copy_(tensor)
        self._missing.discard(own)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        own = self._own.get(self._names.get(name, ""))
        if own is None or tuple(own.shape) != shape:
            wanted = "no such weight" if own is None else f"expected {tuple(own.shape)}"
            raise CheckpointError(
                f"the weights received are of another model: {name} is {shape}, {wanted}. "
                f"{self._cure}"
            )

    def _complete(self) -> None:
        if self._missing:
            raise CheckpointError(
                f"the weights received lack {len(self._missing)}, e.g. {min(self._missing)}"
            )


def _anything(name: str, shape: tuple[int, ...]) -> None:
    pass


def _nothing() -> None:
    pass
