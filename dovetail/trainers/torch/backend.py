"""The backend of one process: any transformers causal LM, on CPU or one GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dovetail.algorithms.logprobs import TokenLoss, head_gradients, head_logprobs
from dovetail.batch.pack import MicroBatch
from dovetail.batch.plan import PlannedBatch, Scope, plan_packed, plan_padded, used_length
from dovetail.batch.rows import TrainRow
from dovetail.config.sections import BatchConfig, OptimizerConfig
from dovetail.trainers.torch.optim import MasterAdamW, StepResult
from dovetail.trainers.torch.scored_model import ScoredModel

CPU_BUDGET = 4096
"""More tokens at once are no faster on a CPU: measured, 600 to 4,096 differ by 4 %."""
WORTH_PACKING = 0.95
"""Packed lines pay from this share of the padded tokens on: equal rows run faster as a batch."""


class TorchBackend:
    """Satisfies `dovetail.trainers.backend.Backend`."""

    def __init__(
        self,
        model: Any,
        reference_model: Any | None,
        batch: BatchConfig,
        optimizer: OptimizerConfig,
        *,
        temperature: float,
        total_steps: int | None,
    ):
        self.policy = ScoredModel(model)
        self.reference = None if reference_model is None else ScoredModel(reference_model)
        self.batch_config, self.temperature = batch, temperature
        self.optimizer = MasterAdamW(model, optimizer, total_steps)
        self.share_prompts = True

    def plan(
        self, rows: Sequence[TrainRow], chosen: Sequence[int], scope: Scope = Scope.TRAINED
    ) -> list[PlannedBatch]:
        """Packed lines with shared prompts where policy and reference can, padded lines
        otherwise."""
        budget, max_rows = self.batch_config.max_tokens_per_gpu, self.batch_config.micro_batch_size
        longest = max((used_length(rows[i], scope) for i in chosen), default=0)
        if self.policy.device.type == "cpu":
            # A long prompt still needs room for several siblings beside it.
            budget = min(budget, max(CPU_BUDGET, 4 * longest))
        padded = plan_padded(rows, chosen, budget, max_rows, scope=scope)
        if not self._packs(longest):
            return padded
        packed = plan_packed(rows, chosen, budget, max_rows, share=self.share_prompts, scope=scope)
        saves = _tokens(packed) < WORTH_PACKING * _tokens(padded)
        return packed if saves else padded

    def _packs(self, longest: int) -> bool:
        models = [self.policy] + ([self.reference] if self.reference is not None else [])
        return all(
            model.packs and (model.longest_packed is None or longest <= model.longest_packed)
            for model in models
        )

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch, reference: bool = False) -> torch.Tensor:
        """See `Backend`."""
        model = self.reference if reference else self.policy
        assert model is not None
        model.eval_mode()
        targets_N = batch.targets_N.to(model.device)
        with model.attention_for(batch):
            if model.head is None:
                logits_NV = model.logits(batch).div_(self.temperature)
                return _gathered(logits_NV, targets_N)
            hidden_NH = model.hidden(batch)
        return head_logprobs(hidden_NH, model.head, targets_N, self.temperature)[0]

    def accumulate(self, batch: MicroBatch, token_loss: TokenLoss) -> None:
        """See `Backend`."""
        model = self.policy
        model.eval_mode()
        targets_N = batch.targets_N.to(model.device)
        with model.attention_for(batch):
            if model.head is None:
                self._accumulate_own_logits(batch, targets_N, token_loss)
            else:
                hidden_NH = model.hidden(batch)
                grad_NH = head_gradients(
                    hidden_NH.detach(),
                    model.head,
                    targets_N,
                    self.temperature,
                    token_loss,
                    self.optimizer.grad_for(model.head.weight_VH),  # type: ignore[arg-type]
                    self.optimizer.grad_for(model.head.bias_V),  # type: ignore[arg-type]
                )
                hidden_NH.backward(grad_NH)
        self.optimizer.collect()

    def _accumulate_own_logits(
        self, batch: MicroBatch, targets_N: torch.Tensor, token_loss: TokenLoss
    ) -> None:
        logits_NV = self.policy.logits(batch) / self.temperature
        logprobs_NV = torch.log_softmax(logits_NV, -1)
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
        logprobs_N = logprobs_NV.gather(1, targets_N[:, None]).squeeze(1)
        torch.autograd.backward(token_loss(slice(0, len(targets_N)), logprobs_N, entropy_N))

    def step(self) -> StepResult:
        """See `Backend`."""
        return self.optimizer.step()

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Master weights, moments and schedule; frozen weights come from the checkpoint they came
        from."""
        return self.optimizer.state_dict()

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """See `MasterAdamW.load_state_dict`."""
        self.optimizer.load_state_dict(tensors, facts)


def _tokens(plans: Sequence[PlannedBatch]) -> int:
    return sum(plan.num_tokens for plan in plans)


def _gathered(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits_NV, -1).gather(1, targets_N[:, None]).squeeze(1)
