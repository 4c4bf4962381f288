"""A model whole on every rank, and what the backend asks of a model wherever its weights are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dovetail.checkpoint.adapters import is_adapter
from dovetail.checkpoint.hf_names import named_tensors
from dovetail.trainers.data_parallel import ALONE, DataParallel
from dovetail.trainers.torch.context_parallel import ContextParallel

Grads = Mapping[str, torch.Tensor]
"""This rank's part of each weight's gradient, by the weight's name."""
GradFor = Callable[[torch.nn.Parameter | None], torch.Tensor | None]


class Placed(Protocol):
    """One model of one rank: whole here, or sharded over several."""

    model: Any
    parallel: DataParallel
    device: torch.device
    group: dist.ProcessGroup | None
    """Every rank that holds a part; None: this one alone."""
    context: ContextParallel | None
    shards: bool
    """Whether passes are collective: all ranks of the group must make as many."""

    @property
    def dtype(self) -> torch.dtype:
        """In which passes compute."""
        ...

    def base_output(self, **inputs: Any) -> Any:
        """`model.base_model(**inputs)`, with the head's weights whole until `passed`."""
        ...

    def passed(self) -> None:
        """A pass without gradient is over, or one was cut off."""
        ...

    def broken(self) -> None:
        """A pass raised on all ranks alike."""
        ...

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a weight or gradient, in the same memory."""
        ...

    def storable(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """A tensor like this rank's part of the weight `name`, as part of what all hold."""
        ...

    def head_grads(
        self, grad_for: GradFor, params: Sequence[Any]
    ) -> contextlib.AbstractContextManager[list[torch.Tensor | None]]:
        """Float32 tensors that take in the gradient of the head's weights; None: not wanted
        here."""
        ...

    def add_up(self, grads: Grads) -> None:
        """Make the gradients those of all ranks' micro-batches, in place."""
        ...

    def norm(self, grads: Grads) -> float:
        """Of all ranks' parts together."""
        ...

    def kept(self) -> Iterator[torch.Tensor]:
        """This rank's memory of weights and buffers, as it is between passes."""
        ...

    def named_tensors(self, most_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Backend.hf_tensors`; at most so many bytes are gathered at a time, or what can't be
        taken apart."""
        ...

    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """The adapters alone, whole, by their names in the model; all ranks call it."""
        ...


class Whole:
    """A model that this rank has whole; gradients are added up over the ranks before a step."""

    context: ContextParallel | None = None
    shards = False

    def __init__(self, model: Any, parallel: DataParallel = ALONE):
        self.model, self.parallel, self.group = model, parallel, parallel.group
        self.device: torch.device = next(model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """See `Placed`."""
        found: torch.dtype = self.model.dtype
        return found

    def base_output(self, **inputs: Any) -> Any:
        """See `Placed`."""
        return self.model.base_model(**inputs)

    def passed(self) -> None:
        """See `Placed`."""

    def broken(self) -> None:
        """See `Placed`."""

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Placed`."""
        return tensor

    def storable(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """See `Placed`."""
        return local

    @contextlib.contextmanager
    def head_grads(
        self, grad_for: GradFor, params: Sequence[Any]
    ) -> Iterator[list[torch.Tensor | None]]:
        """See `Placed`."""
        yield [grad_for(param) for param in params]

    def add_up(self, grads: Grads) -> None:
        """See `Placed`."""
        for grad in grads.values():
            self.parallel.summed(grad)

    def norm(self, grads: Grads) -> float:
        """See `Placed`."""
        norms = torch._foreach_norm(list(grads.values()))
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def kept(self) -> Iterator[torch.Tensor]:
        """See `Placed`."""
        yield from (p.detach() for p in self.model.parameters())
        yield from self.model.buffers()

    def named_tensors(self, most_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Placed`: there is nothing to gather."""
        return named_tensors(self.model)

    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """See `Placed`."""
        return {n: p.detach() for n, p in self.model.named_parameters() if is_adapter(n)}


def placed(model: Any, parallel: DataParallel = ALONE) -> Placed:
    """The model as it is placed; a plain one is whole here."""
    if hasattr(model, "base_output"):
        found: Placed = model
        return found
    return Whole(model, parallel)
