"""What a training backend does. It knows how to forward, add up gradients, step and save; never
what the loss is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
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

    def replaying(
        self, rows: Sequence[TrainRow], rollout_id: int = ...
    ) -> AbstractContextManager[None]:
        """What passes over these rows must run inside, all in one. The number is for functions of
        the user's that a backend calls."""
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

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What following steps depend on, for one rank that holds it all; live tensors."""
        ...

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Go on from a `state_dict`, on one rank."""
        ...

    def save(self, directory: Path, *, in_background: bool = ...) -> dict[str, Any]:
        """Write into `directory`, which exists, is empty and is seen by all ranks, what following
        steps depend on; each rank its own shards. No file in it can run code when it is read.

        Args:
            in_background: come back as soon as the state is copied, so that training may go on;
                `finish_save` waits for the files.

        Returns:
            Facts that JSON can hold, the same on every rank, for `load` and for the manifest.

        Raises:
            CheckpointError: a file can't be written, on whichever rank.
        """
        ...

    def has_saved(self) -> bool:
        """Whether this rank is done with a save in the background, however that went."""
        ...

    def finish_save(self) -> None:
        """Wait until the files of a save in the background are on the disk, on all ranks.

        Raises:
            CheckpointError: one could not be written.
        """
        ...

    def load(self, directory: Path, facts: Mapping[str, Any]) -> None:
        """Go on from what a backend of this kind saved, on any number of ranks and in any layout.

        Raises:
            CheckpointError: it is of another model or another kind of backend, or damaged.
        """
        ...

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's weights, whole, by the names of its Hugging Face files and in the model's
        type; adapters merged in. All ranks iterate together, to the end.

        Rank 0 gets the tensors. Others get the same names, each with an empty tensor or a whole
        one. At no time does a rank itself hold more than `update_weight_buffer_size` bytes of them
        beside its own weights, or one module's if that is more. Whole models on one rank give their
        own tensors, which the next step changes; others give copies.
        """
        ...

    def beside_export(self) -> Callable[[Path], None] | None:
        """What writes more than weights into the directory of an export (adapters alone); None:
        there is no more. All ranks call it."""
        ...

    def offload(self) -> None:
        """Move weights, gradients and optimizer to CPU memory, and give up their device memory. No
        pass may run before `onload`. Called twice it does nothing more."""
        ...

    def onload(self) -> None:
        """Undo `offload`."""
        ...
