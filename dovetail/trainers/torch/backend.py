"""The backend for any transformers causal LM, on CPU or GPU, whole on each rank or sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dovetail.algorithms.logprobs import TokenLoss, head_gradients, head_logprobs
from dovetail.batch.pack import MicroBatch
from dovetail.batch.plan import PlannedBatch, Scope, by_tokens
from dovetail.batch.rows import TrainRow, check_ids
from dovetail.config.sections import BatchConfig, OptimizerConfig
from dovetail.trainers.backend import BatchLoss, OnLogits, PerBatch, PerToken
from dovetail.trainers.data_parallel import ALONE, DataParallel
from dovetail.trainers.memory import Stowed
from dovetail.trainers.torch.layout import plan_for
from dovetail.trainers.torch.lora import adapter_export, scaling_of
from dovetail.trainers.torch.optim import MasterAdamW, StepResult
from dovetail.trainers.torch.placement import Placed, placed
from dovetail.trainers.torch.routing import make_replay
from dovetail.trainers.torch.saving import FORMAT, ShardFiles, check_format
from dovetail.trainers.torch.scored_model import ScoredModel

if TYPE_CHECKING:
    from dovetail.trainers.backend import WholeLoss

GATHER_BYTES = 512 << 20


class TorchBackend:
    """Satisfies `dovetail.trainers.backend.Backend`. Trains `model` in place: its tensors are never
    replaced, so an engine may share them.

    Args:
        model: a transformers model, whole here, or a `Sharded` one, which brings its own
            `DataParallel`.
        reference_model: frozen, and placed like it; `model` itself, which has adapters: it without
            them.
        others: models beside policy and reference that see the policy's micro-batches, whose layout
            has to suit them too.
        parallel: of models that are whole.
        gather_bytes: of whole tensors that `hf_tensors` gathers at a time.
    """

    def __init__(
        self,
        model: Any | Placed,
        reference_model: Any | Placed | None,
        batch: BatchConfig,
        optimizer: OptimizerConfig,
        *,
        temperature: float,
        total_steps: int | None,
        routing_replay: str | None = None,
        others: Sequence[ScoredModel] = (),
        parallel: DataParallel = ALONE,
        gather_bytes: int = GATHER_BYTES,
    ):
        own = placed(model, parallel)
        self.policy, self.parallel, self.device = ScoredModel(own), own.parallel, own.device
        if routing_replay is not None:
            self.policy.routing = make_replay(own.model, routing_replay)
            # It was tried: weights that stayed whole are not those that the optimizer is to have.
            own.passed()
        self.reference = self._reference(model, reference_model)
        references = [] if self.reference is None else [self.reference]
        self._models, self._others = [self.policy, *references, *others], others
        self.batch_config, self.temperature = batch, temperature
        self.gather_bytes = gather_bytes
        self.optimizer = MasterAdamW(own, optimizer, total_steps)
        self._stowed: Stowed | None = None
        self.files = ShardFiles(own.group)
        self.share_prompts, self.runs_ahead = True, False
        self._vocab_size = int(own.model.get_input_embeddings().weight.shape[0])

    def _reference(self, model: Any, reference: Any | None) -> ScoredModel | None:
        if reference is None:
            return None
        return self.policy.base() if reference is model else ScoredModel(reference)

    def plan(
        self, rows: Sequence[TrainRow], chosen: Sequence[int], scope: Scope = Scope.TRAINED
    ) -> list[PlannedBatch]:
        """Packed lines with shared prompts where all models can, padded lines otherwise.

        Raises:
            TrainError: a row has a token id that the model does not.
        """
        check_ids([rows[i] for i in chosen], self._vocab_size)
        routing = self.policy.routing
        same = by_tokens if routing is None else routing.same_prompt
        return plan_for(
            self._models,
            self.batch_config,
            rows,
            chosen,
            scope,
            same if self.share_prompts else None,
            self.parallel.size,
        )

    @property
    def has_reference(self) -> bool:
        return self.reference is not None

    def replaying(
        self, rows: Sequence[TrainRow], rollout_id: int = 0
    ) -> contextlib.AbstractContextManager[None]:
        """What passes over these rows must run inside, all in one, so that later ones take the
        experts of earlier ones.

        Raises:
            TrainError: see `RoutingReplay.of`.
        """
        routing = self.policy.routing
        return contextlib.nullcontext() if routing is None else routing.of(rows)

    def routing_metrics(self) -> dict[str, float]:
        """See `RoutingReplay.take_metrics`."""
        routing = self.policy.routing
        return {} if routing is None else routing.take_metrics(self.parallel)

    def logprobs(
        self, batches: Iterable[MicroBatch], idle: int = 0, *, reference: bool = False
    ) -> Iterator[torch.Tensor]:
        """See `Backend`."""
        model = self.reference if reference else self.policy
        assert model is not None
        for batch in batches:
            yield logprobs_of(model, batch, self.temperature)
        for _ in range(idle):
            idle_pass(model)
        if self.policy.routing is not None and not reference:
            self.policy.routing.share(self.parallel)

    def accumulate(self, batches: Iterable[MicroBatch], loss: BatchLoss, idle: int = 0) -> None:
        """See `Backend`."""
        for batch in batches:
            self.policy.train_mode()
            with self.policy.attention_for(batch):
                match loss:
                    case PerToken():
                        self._per_token(batch, loss.of(batch))
                    case PerBatch():
                        self._per_batch(batch, loss.of(batch))
                    case OnLogits():
                        logits_NV = self.policy.logits(batch)
                        self._backward(loss.of(batch)(logits_NV), logits_NV)
            self.optimizer.collect()
        # An engine may decode with the same modules.
        self.policy.eval_mode()
        if self.policy.placed.shards:
            for _ in range(idle):
                self._idle_round(isinstance(loss, OnLogits))

    def _idle_round(self, with_others: bool) -> None:
        """What `accumulate` makes of a micro-batch, as far as other ranks notice."""
        self.policy.eval_mode()
        value = self.policy.idle()
        if with_others:
            for model in self._others:
                idle_pass(model)
        torch.autograd.backward(value)
        self.optimizer.collect()

    def _per_token(self, batch: MicroBatch, token_loss: TokenLoss) -> None:
        targets_N = batch.targets_N.to(self.device)
        if self.policy.head is None:
            logprobs_N, entropy_N = self._own_logprobs(batch, targets_N)
            value = token_loss(slice(0, len(targets_N)), logprobs_N, entropy_N)
            self._backward(value, logprobs_N)
        else:
            hidden_NH = self.policy.hidden(batch)
            hidden_NH.backward(self._head_gradients(hidden_NH, targets_N, token_loss))

    def _per_batch(self, batch: MicroBatch, loss: WholeLoss) -> None:
        """Through a head the logits are made twice: for the values, and for the gradient once its
        slopes are known."""
        targets_N = batch.targets_N.to(self.device)
        if self.policy.head is None:
            logprobs_N, entropy_N = self._own_logprobs(batch, targets_N)
            self._backward(loss(logprobs_N, entropy_N), logprobs_N)
            return
        hidden_NH = self.policy.hidden(batch)
        head = self.policy.head
        known = head_logprobs(hidden_NH.detach(), head, targets_N, self.temperature)
        slopes = _slopes(loss, *known)
        if slopes is not None:
            hidden_NH.backward(self._head_gradients(hidden_NH, targets_N, slopes))
        else:
            self._backward(None, hidden_NH)

    def _backward(self, loss: torch.Tensor | None, output: torch.Tensor) -> None:
        """Without a loss nothing is learned, but other ranks may wait for this one's part."""
        if loss is None and self.policy.placed.shards:
            loss = output.float().sum() * 0
        if loss is not None:
            torch.autograd.backward(loss)

    def _own_logprobs(
        self, batch: MicroBatch, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_NV = self.policy.logits(batch) / self.temperature
        logprobs_NV = torch.log_softmax(logits_NV, -1)
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
        return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropy_N

    def _head_gradients(
        self, hidden_NH: torch.Tensor, targets_N: torch.Tensor, token_loss: TokenLoss
    ) -> torch.Tensor:
        head = self.policy.head
        assert head is not None
        params = (head.weight_VH, head.bias_V)
        with self.policy.placed.head_grads(self.optimizer.grad_for, params) as (weight_VH, bias_V):
            return head_gradients(
                hidden_NH.detach(),
                head,
                targets_N,
                self.temperature,
                token_loss,
                weight_VH,
                bias_V,
            )

    def discard(self) -> None:
        """See `Backend`."""
        self.policy.placed.broken()
        self.optimizer.drop_grads()

    def step(self) -> StepResult:
        """See `Backend`."""
        return self.optimizer.step()

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Master weights, moments and schedule; frozen weights come from the checkpoint they came
        from."""
        tensors, facts = self.optimizer.state_dict()
        return tensors, {**facts, **self._adapter_facts()}

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """See `MasterAdamW.load_state_dict`."""
        self.optimizer.load_state_dict(tensors, facts)

    def save(self, directory: Path, *, in_background: bool = False) -> dict[str, Any]:
        """See `Backend`."""
        self.files.write(directory, self.optimizer.shards(), in_background)
        return {
            "format": FORMAT,
            "steps_done": self.optimizer.steps_done,
            **self._adapter_facts(),
        }

    def _adapter_facts(self) -> dict[str, Any]:
        scaling = scaling_of(self.policy.model)
        return {} if scaling is None else {"lora_scaling": scaling}

    def beside_export(self) -> Callable[[Path], None] | None:
        """What writes more than the weights into an export: adapters alone. All ranks call it."""
        return adapter_export(self.policy.placed)

    def has_saved(self) -> bool:
        """See `Backend`."""
        return self.files.done

    def finish_save(self) -> None:
        """See `Backend`."""
        self.files.finish()

    def load(self, directory: Path, facts: Mapping[str, Any]) -> None:
        """See `Backend`."""
        check_format(facts, FORMAT, "the torch backend")
        self.files.read(directory, self.optimizer.room_for(int(facts["steps_done"])))
        self.optimizer.taken()

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Backend`."""
        return self.policy.placed.named_tensors(self.gather_bytes)

    def offload(self) -> None:
        """See `Backend`."""
        if self._stowed is None:
            self.discard()
            kept = [tensor for model in self._models for tensor in model.placed.kept()]
            self._stowed = Stowed([*kept, *self.optimizer.kept()], [])

    def onload(self) -> None:
        """See `Backend`."""
        if self._stowed is not None:
            self._stowed.restore()
            self._stowed = None


@torch.no_grad()
def logprobs_of(model: ScoredModel, batch: MicroBatch, temperature: float) -> torch.Tensor:
    """Logprobs of the scored tokens, [N] float32."""
    model.eval_mode()
    targets_N = batch.targets_N.to(model.device)
    with model.attention_for(batch):
        if model.head is None:
            logits_NV = model.logits(batch).div_(temperature)
            logprobs_N = torch.log_softmax(logits_NV, -1).gather(1, targets_N[:, None]).squeeze(1)
        else:
            hidden_NH = model.hidden(batch)
            logprobs_N = head_logprobs(hidden_NH, model.head, targets_N, temperature)[0]
    model.placed.passed()
    return logprobs_N


@torch.no_grad()
def idle_pass(model: ScoredModel) -> None:
    """Take part in other ranks' passes without gradients, where passes are collective."""
    if model.placed.shards:
        model.eval_mode()
        model.idle()
        model.placed.passed()


@torch.enable_grad()
def _slopes(loss: WholeLoss, logprobs_N: torch.Tensor, entropy_N: torch.Tensor) -> TokenLoss | None:
    """The loss's slopes at these values, as the linear loss of single tokens that has them too."""
    logprobs_N.requires_grad_()
    entropy_N.requires_grad_()
    value = loss(logprobs_N, entropy_N)
    if value is None:
        return None
    by_logprob_N, by_entropy_N = torch.autograd.grad(
        value, (logprobs_N, entropy_N), allow_unused=True
    )

    def linear(part: slice, logprobs_n: torch.Tensor, entropy_n: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=logprobs_n.device, requires_grad=True)
        if by_logprob_N is not None:
            total = total + (by_logprob_N[part] * logprobs_n).sum()
        if by_entropy_N is not None:
            total = total + (by_entropy_N[part] * entropy_n).sum()
        return total

    return linear
