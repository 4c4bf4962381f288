"""What a training backend does. It knows how to forward, add up gradients, step and save; never
what the loss is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dovetail.batch.plan import PlannedBatch, Scope
from dovetail.batch.rows import TrainRow
from dovetail.trainers.data_parallel import DataParallel

if TYPE_CHECKING:
    import torch

    from dovetail.algorithms.logprobs import TokenLoss
    from dovetail.batch.pack import MicroBatch
    from dovetail.trainers.torch.optim import StepResult

    WholeLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
    """`(logprobs_N, entropy_N) -> scalar`; None: there is nothing to learn."""
    LogitsLoss = Callable[[torch.Tensor], torch.Tensor | None]
    """`logits [T, V], untempered, of all positions -> scalar`."""


@dataclass(frozen=True, slots=True)
class PerToken:
    """A loss that is a sum over tokens: what makes a micro-batch's share of it, piece by piece."""

    of: Callable[[MicroBatch], TokenLoss]


@dataclass(frozen=True, slots=True)
class PerBatch:
    """A loss that needs all scored tokens of a micro-batch at once."""

    of: Callable[[MicroBatch], WholeLoss]


@dataclass(frozen=True, slots=True)
class OnLogits:
    """A loss on the logits of all positions of a micro-batch, planned under `Scope.SEQUENCE`."""

    of: Callable[[MicroBatch], LogitsLoss]


BatchLoss = PerToken | PerBatch | OnLogits


class Backend(Protocol):
    """One rank's part of one policy in training, and perhaps of a frozen reference.

    All ranks make the same calls in the same order.
    """

    parallel: DataParallel
    device: torch.device
    runs_ahead: bool
    """Whether a micro-batch's pass may begin before an earlier one's has ended (pipelines): a loss
    then can't make passes of its own."""

    @property
    def has_reference(self) -> bool: ...

    def plan(
        self, rows: Sequence[TrainRow], chosen: Sequence[int], scope: Scope = ...
    ) -> list[PlannedBatch]:
        """Micro-batches of the chosen rows, for all ranks, in the layout that suits the model."""
        ...

    def replaying(self, rows: Sequence[TrainRow]) -> AbstractContextManager[None]:
        """What passes over these rows must run inside, all in one."""
        ...

    def routing_metrics(self) -> dict[str, float]:
        """Of the passes since the last call; nothing without routing replay."""
        ...

    def logprobs(
        self, batches: Iterable[MicroBatch], idle: int = ..., *, reference: bool = ...
    ) -> Iterable[torch.Tensor]:
        """Logprobs of the scored tokens of each micro-batch without gradients, [N] float32; zeros
        where another rank has them. `idle` as in `Share`."""
        ...

    def accumulate(self, batches: Iterable[MicroBatch], loss: BatchLoss, idle: int = ...) -> None:
        """Forward and backward of this rank's micro-batches: add the gradient of their summed loss
        to the step's gradient."""
        ...

    def discard(self) -> None:
        """Forget the gathered gradient."""
        ...

    def step(self) -> StepResult:
        """Apply the gradient that all ranks gathered, or nothing of it when it is not finite."""
        ...

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]: ...

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None: ...
