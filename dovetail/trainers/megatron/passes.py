"""Forward and backward passes over micro-batches through the stages of a pipeline.

    line -> embedding .. layers .. norm (all stages) -> head and loss (the last stage's ranks)

Megatron's schedule decides the order; what a micro-batch adds to the loss is known only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from dovetail.trainers.backend import BatchLoss, OnLogits, PerBatch, PerToken
from dovetail.trainers.megatron.head import vocab_parallel_logprobs
from dovetail.trainers.megatron.line import Line
from dovetail.trainers.megatron.parallel import Ranks
from dovetail.trainers.megatron.provider import bare
from dovetail.trainers.megatron.routing import Replay

AtEnd = Callable[[Any, Line, torch.Tensor], Any]
"""`(model, line, its output) -> what the schedule goes on with`, on the last stage."""


class Passes:
    """The passes of one model, in training or frozen."""

    def __init__(
        self,
        chunks: Sequence[Any],
        ranks: Ranks,
        vocab_size: int,
        temperature: float,
        replay: Replay | None = None,
    ):
        self.chunks, self.ranks, self.replay = list(chunks), ranks, replay
        self.vocab_size, self.temperature = vocab_size, temperature
        self.config: Any = bare(chunks[0]).config
        self.config.finalize_model_grads_func = _finalize

    @torch.no_grad()
    def logprobs(self, lines: Sequence[Line]) -> list[torch.Tensor]:
        """[N] float32 of each line; zeros where another pipeline stage has the head."""
        found = [torch.zeros(line.count, device=self.ranks.device) for line in lines]
        places = {id(line): number for number, line in enumerate(lines)}

        def at_end(model: Any, line: Line, output: torch.Tensor) -> None:
            found[places[id(line)]], _ = self._scored(model, line, output)

        for chunk in self.chunks:
            chunk.eval()
        self._run(lines, at_end, forward_only=True)
        return found

    def accumulate(self, lines: Sequence[Line], loss: BatchLoss) -> None:
        """Add the gradient of the lines' summed loss up, and over the ranks."""

        def at_end(model: Any, line: Line, output: torch.Tensor) -> Any:
            value = None if line.batch is None else self._loss(model, line, output, loss)
            if value is None:
                value = output.sum() * 0.0
            return value, torch.zeros((), dtype=torch.int, device=self.ranks.device), {}

        for chunk in self.chunks:
            # Layers are recomputed in this mode only; there is no dropout.
            chunk.train()
        self._hold_back_sums()
        self._run(lines, at_end, forward_only=False)

    def _run(self, lines: Sequence[Line], at_end: AtEnd, *, forward_only: bool) -> None:
        longest = max(line.input_ids_1S.shape[1] for line in lines)
        iterators = [iter(lines) for _ in self.chunks]
        if self.replay is not None:
            self.replay.begin()
        get_forward_backward_func()(
            forward_step_func=partial(self._step, at_end=at_end, forward_only=forward_only),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(lines),
            seq_length=longest,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _hold_back_sums(self) -> None:
        """Where sums over ranks overlap backward passes, only the last micro-batch starts them."""
        if self.chunks[0].ddp_config.overlap_grad_reduce:
            held = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = held if len(held) > 1 else held[0]

    def _step(
        self, lines: Iterator[Line], chunk: Any, *, at_end: AtEnd, forward_only: bool
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        line, model = next(lines), bare(chunk)
        if self.replay is not None:
            self.replay.enter(chunk, line)
        # A head in Megatron's own forward would make all logits of the line.
        has_head, model.post_process = model.post_process, False
        try:
            output = chunk(
                input_ids=line.input_ids_1S,
                position_ids=line.position_ids_1S,
                attention_mask=None,
                packed_seq_params=line.packing,
            )
        finally:
            model.post_process = has_head
        if self.replay is not None:
            self.replay.leave(chunk, line, records=forward_only)
        return output, lambda output, non_loss_data=False: at_end(model, line, output)

    def _loss(
        self, model: Any, line: Line, output: torch.Tensor, loss: BatchLoss
    ) -> torch.Tensor | None:
        assert line.batch is not None
        match loss:
            case PerToken():
                every = slice(0, line.count)
                return loss.of(line.batch)(every, *self._scored(model, line, output))
            case PerBatch():
                return loss.of(line.batch)(*self._scored(model, line, output))
            case OnLogits():
                return loss.of(line.batch)(self._logits(model, line, output))

    def _scored(
        self, model: Any, line: Line, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logprobs and entropy of the line's scored tokens, [N] each, on every rank that has the
        head; through those that this rank computed they carry gradients."""
        hidden_nH, weight_vH, first = self._before_head(model, line, output)
        if line.batch is None:
            none = torch.zeros(0, device=hidden_nH.device)
            return none, none
        targets_n = line.batch.targets_N.to(hidden_nH.device)[line.scored_n]
        group = parallel_state.get_tensor_model_parallel_group()
        own = vocab_parallel_logprobs(
            hidden_nH, weight_vH, targets_n, self.temperature, first, group
        )
        return self._whole(own[0], line), self._whole(own[1], line)

    def _logits(self, model: Any, line: Line, output: torch.Tensor) -> torch.Tensor:
        hidden_nH, weight_vH, _ = self._before_head(model, line, output, padded=True)
        logits_nv = torch.nn.functional.linear(hidden_nH, weight_vH)
        logits_nV = tensor_parallel.gather_from_tensor_model_parallel_region(logits_nv)
        return self._whole(logits_nV[:, : self.vocab_size].float(), line)

    def _before_head(
        self, model: Any, line: Line, output: torch.Tensor, padded: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Hidden states of the scored tokens on this rank, its rows of the head, and the id of the
        first."""
        shared = model.share_embeddings_and_output_weights
        weight_vH = (
            model.shared_embedding_or_output_weight() if shared else model.output_layer.weight
        )
        hidden = output.to(weight_vH.dtype)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True
            )
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        first = self.ranks.tp * len(weight_vH)
        if not padded:
            weight_vH = weight_vH[: self.vocab_size - first]
        return hidden[:, 0].index_select(0, line.at_n), weight_vH, first

    def _whole(self, own: torch.Tensor, line: Line) -> torch.Tensor:
        if self.ranks.cp_size == 1:
            return own
        group = parallel_state.get_context_parallel_group()
        return _Placed.apply(own, line.scored_n, line.count, group)  # type: ignore[no-any-return, no-untyped-call]


class _Placed(torch.autograd.Function):
    """Values of this rank's tokens among those of all; each rank's gradient is of its own."""

    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, places_n: torch.Tensor, count: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.save_for_backward(places_n)
        whole = own.new_zeros(count, *own.shape[1:])
        whole[places_n] = own
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (places_n,) = ctx.saved_tensors
        return grads[0][places_n], None, None, None


def _finalize(model: Any, num_tokens: Any = None, **more: Any) -> None:
    # The loss's weights are of the whole step, so nothing is divided by a number of tokens.
    finalize_model_grads(model, None, **more)
