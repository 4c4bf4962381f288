"""Weights, gradients and moments out of a device's memory and back, at the same addresses: what
Megatron keeps as views of one buffer stays so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Stowed:
    """Storages that were emptied, and what was in them."""

    def __init__(self, kept: Iterable[torch.Tensor], zeroed: Iterable[torch.Tensor]):
        """`kept`: whose values are to come back; `zeroed`: which come back as zeros."""
        kept, zeroed = [*kept], [*zeroed]
        for tensor in (*kept, *zeroed):
            if not tensor.untyped_storage().resizable():
                # A view of a file, or of memory that is another's.
                tensor.data = tensor.detach().clone()
        self._kept = [(one, _whole(one).to("cpu", copy=True)) for one in _distinct(kept)]
        self._zeroed = [(one, one.nbytes()) for one in _distinct(zeroed)]
        for storage, _ in (*self._kept, *self._zeroed):
            storage.resize_(0)

    def restore(self) -> None:
        """Everything back."""
        for storage, values in self._kept:
            storage.resize_(values.numel())
            _whole(storage).copy_(values)
        for storage, size in self._zeroed:
            storage.resize_(size)
            _whole(storage).zero_()


def _distinct(tensors: Iterable[torch.Tensor]) -> list[Any]:
    found: dict[int, Any] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


def _whole(storage: Any) -> torch.Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))
