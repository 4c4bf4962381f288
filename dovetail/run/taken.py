"""Weights that an embedded engine takes hand to hand, straight into its own tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from dovetail.checkpoint.hf_names import named_tensors
from dovetail.checkpoint.hf_weights import fitted, own_names
from dovetail.transport.hand_over import handed_over
from dovetail.types.errors import CheckpointError

if TYPE_CHECKING:
    from dovetail.types.weights import Meeting


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
            if all(name in self._names for name, _ in named_tensors(self._model)):
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
