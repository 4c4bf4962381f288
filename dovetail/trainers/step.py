"""The training step that every backend shares: micro-batches in, one optimizer step and its metrics
out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from dovetail.algorithms.inputs import TokenInputs
from dovetail.batch.pack import MicroBatch
from dovetail.config.sections import AlgorithmConfig
from dovetail.trainers.backend import Backend, BatchLoss
from dovetail.trainers.sums import Sums

Loss = Callable[[TokenInputs, AlgorithmConfig], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True, slots=True)
class TokenValues:
    """What is known of a micro-batch's N scored tokens before its forward pass, each [N]
    float32 unless said."""

    weights_N: torch.Tensor
    advantages_N: torch.Tensor
    rollout_logprobs_N: torch.Tensor
    """NaN where unknown."""
    places_N: torch.Tensor
    """Which token of which row, see `MicroBatch.places`; int64."""
    old_logprobs_N: torch.Tensor | None = None
    """None: no step was taken since the rollout, so they are the current ones."""
    ref_logprobs_N: torch.Tensor | None = None


def train_step(
    backend: Backend, batches: Iterable[MicroBatch], loss: BatchLoss, sums: Sums, idle: int = 0
) -> dict[str, float]:
    """Add up the gradient of all micro-batches, then step once.

    Metrics: `train/loss` and the loss's own as `train/<name>`, `train/grad_norm`, `train/lr`,
    `train/skipped_steps` (1.0 when the gradient was not finite), and the comparison with the
    engine.
    """
    backend.accumulate(batches, loss, idle)
    outcome = backend.step()
    sums.over(backend.parallel)
    return {
        **sums.result(),
        "train/grad_norm": outcome.grad_norm,
        "train/lr": outcome.lr,
        "train/skipped_steps": float(not outcome.applied),
    }


def token_loss_of(
    values: TokenValues, loss: Loss, config: AlgorithmConfig, sums: Sums
) -> Callable[[slice, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The share of a piece of the micro-batch, for losses that look at single tokens."""

    def token_loss(part: slice, logprobs_n: torch.Tensor, entropy_n: torch.Tensor) -> torch.Tensor:
        device = logprobs_n.device
        current_n = logprobs_n.detach()
        old = values.old_logprobs_N
        old_n = current_n if old is None else old[part].to(device)
        ref = values.ref_logprobs_N
        inputs = TokenInputs(
            logprobs_N=logprobs_n,
            entropy_N=entropy_n,
            old_logprobs_N=old_n,
            advantages_N=values.advantages_N[part].to(device),
            ref_logprobs_N=None if ref is None else ref[part].to(device),
        )
        weights_n = values.weights_N[part].to(device)
        loss_n, metrics = loss(inputs, config)
        sums.add(weights_n, {"loss": loss_n, **metrics})
        trainer_n = current_n if config.use_rollout_logprobs else old_n
        rollout_n = values.rollout_logprobs_N[part].to(device)
        sums.mismatch.add(trainer_n, rollout_n, values.places_N[part])
        return (weights_n * loss_n).sum()

    return token_loss


_SUMMED = (
    "train/skipped_steps",
    "train/critic_skipped_steps",
    "train/tokens",
    "train/model_tokens",
)


def merged(results: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a rollout out of those of its optimizer steps: means, and sums of counts."""
    names = {name: None for result in results for name in result}
    merged: dict[str, float] = {"train/skipped_steps": 0.0, "train/tokens": 0.0}
    for name in names:
        values = [result[name] for result in results if name in result]
        merged[name] = sum(values) if name in _SUMMED else sum(values) / len(values)
    taken = sum("train/skipped_steps" in result for result in results)
    merged["train/optimizer_steps"] = taken - merged["train/skipped_steps"]
    return merged
