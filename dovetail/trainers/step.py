"""The training step that every backend shares: micro-batches in, one optimizer step and its metrics
out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from dovetail.algorithms.inputs import TokenInputs
from dovetail.batch.pack import MicroBatch
from dovetail.config.sections import AlgorithmConfig
from dovetail.trainers.backend import Backend

Loss = Callable[[TokenInputs, AlgorithmConfig], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True, slots=True)
class TokenValues:
    """What is known of a micro-batch's N scored tokens before its forward pass, each [N]
    float32."""

    weights_N: torch.Tensor
    advantages_N: torch.Tensor
    rollout_logprobs_N: torch.Tensor
    """NaN where unknown."""
    old_logprobs_N: torch.Tensor | None = None
    """None: no step was taken since the rollout, so they are the current ones."""
    ref_logprobs_N: torch.Tensor | None = None


class Sums:
    """Adds metrics up over pieces, as tensors: reading a value would make a GPU wait."""

    def __init__(self) -> None:
        self.weighted: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
        self.weight = torch.zeros(())
        self.compared: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
        self.totals: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))

    def add(self, weights_n: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        """Weighted as in the loss."""
        self.weight = self.weight + weights_n.sum()
        for name, values_n in metrics.items():
            self.weighted[name] = self.weighted[name] + (weights_n * values_n.detach()).sum()

    def total(self, values: dict[str, torch.Tensor]) -> None:
        """Shares of what is a sum over micro-batches already."""
        for name, value in values.items():
            self.totals[name] = self.totals[name] + value.detach()

    def compare(self, logprobs_n: torch.Tensor, rollout_logprobs_n: torch.Tensor) -> None:
        """Trainer against engine, over the tokens whose engine logprob is known; every token
        alike."""
        known_n = torch.isfinite(rollout_logprobs_n)
        d_n = torch.where(known_n, logprobs_n - rollout_logprobs_n, 0.0)
        self.compared["tokens"] = self.compared["tokens"] + known_n.sum()
        self.compared["abs_diff"] = self.compared["abs_diff"] + d_n.abs().sum()
        self.compared["kl"] = self.compared["kl"] + (d_n.exp() - 1 - d_n).sum()
        self.compared["max"] = torch.maximum(
            self.compared["max"], d_n.abs().max() if len(d_n) else d_n.new_zeros(())
        )

    def result(self) -> dict[str, float]:
        """Means; the comparison only if any token was compared."""
        weight = float(self.weight)
        out = {f"train/{k}": float(v) / weight for k, v in self.weighted.items() if weight > 0}
        out.update({f"train/{name}": float(value) for name, value in self.totals.items()})
        tokens = float(self.compared["tokens"])
        if tokens:
            out["train/rollout_logprob_abs_diff"] = float(self.compared["abs_diff"]) / tokens
            out["train/rollout_logprob_max_diff"] = float(self.compared["max"])
            # KL(rollout || trainer) by k3, whose samples come from the rollout.
            out["train/rollout_kl"] = float(self.compared["kl"]) / tokens
        return out


def train_step(
    backend: Backend,
    batches: Iterable[MicroBatch],
    accumulate: Callable[[MicroBatch], None],
    sums: Sums,
    on_batch: Callable[[MicroBatch], None],
) -> dict[str, float]:
    """Add up the gradient of all micro-batches, then step once.

    Metrics: `train/loss` and the loss's own as `train/<name>`, `train/grad_norm`, `train/lr`,
    `train/skipped_steps` (1.0 when the gradient was not finite), and the comparison with the
    engine.
    """
    for batch in batches:
        accumulate(batch)
        on_batch(batch)
    outcome = backend.step()
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
        sums.compare(trainer_n, values.rollout_logprobs_N[part].to(device))
        return (weights_n * loss_n).sum()

    return token_loss
