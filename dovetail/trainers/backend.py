"""What a training backend does. It knows how to forward, add up gradients, step and save; never
what the loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dovetail.batch.plan import PlannedBatch, Scope
from dovetail.batch.rows import TrainRow

if TYPE_CHECKING:
    import torch

    from dovetail.algorithms.logprobs import TokenLoss
    from dovetail.batch.pack import MicroBatch
    from dovetail.trainers.torch.optim import StepResult

    WholeLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
    """`(logprobs_N, entropy_N) -> scalar`; None: there is nothing to learn."""
    LogitsLoss = Callable[[torch.Tensor], torch.Tensor | None]
    """`logits [T, V], untempered, of all positions -> scalar`."""


class Backend(Protocol):
    """One policy in training, and perhaps a frozen reference."""

    def plan(
        self, rows: Sequence[TrainRow], chosen: Sequence[int], scope: Scope = ...
    ) -> list[PlannedBatch]:
        """Micro-batches of the chosen rows, in the layout that suits the model."""
        ...

    def logprobs(self, batch: MicroBatch, reference: bool = ...) -> torch.Tensor:
        """Logprobs of the scored tokens without gradients, [N] float32."""
        ...

    def accumulate(self, batch: MicroBatch, token_loss: TokenLoss) -> None:
        """Forward and backward: add the gradient of the summed `token_loss` to the step's
        gradient."""
        ...

    def accumulate_whole(self, batch: MicroBatch, loss: WholeLoss) -> None:
        """As `accumulate`, for a loss that needs all scored tokens at once."""
        ...

    def accumulate_logits(self, batch: MicroBatch, loss: LogitsLoss) -> None:
        """As `accumulate`, for a loss on the logits of all positions of a batch under
        `Scope.SEQUENCE`."""
        ...

    def discard(self) -> None:
        """Forget the gathered gradient."""
        ...

    def step(self) -> StepResult:
        """Apply the gathered gradient, or nothing of it when it is not finite."""
        ...

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]: ...

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None: ...
