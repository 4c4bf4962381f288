"""The user's functions inside training, and when each is called.

convert -> rows -> logprobs -> ADVANTAGE -> whitening -> POSTPROCESS -> optimizer steps
                                                                          micro-batch:
                          logprobs, entropy -> CORRECTION -> REDUCER -> gradient
                          (under custom_loss)  LOSS, on logprobs or on logits
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dovetail.batch.convert import Columns
from dovetail.types.calls import CorrectionCall, LossCall, ReducerCall
from dovetail.types.sample import Sample

if TYPE_CHECKING:
    import torch

ADVANTAGE = "custom_advantage_function"
POSTPROCESS = "rollout_data_postprocess"
LOSS = "custom_loss_function"
CORRECTION = "custom_tis_function"
REDUCER = "custom_pg_loss_reducer_function"


@dataclass(frozen=True, slots=True)
class TrainHooks:
    """In their native forms; None where there is none."""

    advantage: Callable[[Columns], Any] | None = None
    """Sets `advantages` (and `returns`) in the columns, or gives them back."""
    postprocess: Callable[[int, Columns, list[Sample]], Any] | None = None
    """`(rollout_id, columns, samples)`: changes them in place."""
    loss: Callable[[LossCall], Any] | None = None
    """`call -> (loss, metrics)`."""
    logits_loss: Callable[[Columns, torch.Tensor, Callable[..., torch.Tensor]], Any] | None = None
    """`(batch, logits [1, T, V], sum_of_sample_mean) -> (loss, metrics)`: the slime family's."""
    correction: Callable[[CorrectionCall], Any] | None = None
    """`call -> (pg_loss, loss_masks, metrics)`."""
    reducer: Callable[[ReducerCall], Callable[[torch.Tensor], Any]] | None = None
    args: Any = None
    """Flat view over the configuration."""

    @property
    def sees_rollout(self) -> bool:
        """Whether a function gets the whole rollout's columns before the first step."""
        return self.advantage is not None or self.postprocess is not None

    @property
    def sees_batch(self) -> bool:
        """Whether a function gets whole micro-batches, masked response tokens included."""
        return any((self.loss, self.logits_loss, self.correction, self.reducer))
