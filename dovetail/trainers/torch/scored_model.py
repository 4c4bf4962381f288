"""A causal LM as training sees it: token lines in, hidden states at scored tokens out, and its
head.

Everything that is assumed of the model is checked on a few tokens when it is wrapped. What does not
hold costs speed, never rightness: without a plain head the model's own logits are used, without
tree attention lines are padded.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dovetail.algorithms.logprobs import Head
from dovetail.batch.pack import MicroBatch, Segment
from dovetail.trainers.torch import context_parallel, tree_attention
from dovetail.trainers.torch.lora import adapters_off, dropping
from dovetail.trainers.torch.placement import Placed, placed
from dovetail.trainers.torch.routing import RoutingReplay
from dovetail.types.errors import ConfigError

_UNUSABLE = (
    tree_attention.TreeAttentionUnsupportedError,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What an unknown model may raise when it is tried in a way it does not know; it is then not used
that way."""


class ScoredModel:
    """Wraps `model`, which is whole or sharded; keeps no copy of any weight.

    Raises:
        ConfigError: the model gives other values when its sequences are split over ranks.
    """

    def __init__(self, model: Any | Placed):
        self.placed = placed(model)
        self.model, self.device = self.placed.model, self.placed.device
        self.eval_mode()
        self._head, self.head_reason = find_head(self.placed)
        self.packs, self.pack_reason = False, "sequences are split over ranks"
        if self.placed.context is None:
            self.packs, self.pack_reason = self._check_packing()
        else:
            self._check_splitting()
        self.placed.passed()
        self.longest_packed = attention_window(self.model.config.get_text_config())
        """A packed sequence may have no more tokens than this: tree attention knows no window."""
        self.without_adapters = False
        self.routing: RoutingReplay | None = None
        """Whose experts every forward over a micro-batch takes."""

    @property
    def head(self) -> Head | None:
        """With the weights that the head has now: of a sharded model they are whole from
        `hidden` to the end of its backward pass."""
        return None if self._head is None else self._head.now()

    def base(self) -> ScoredModel:
        """The same model with its adapters off."""
        twin = copy.copy(self)
        twin.without_adapters, twin.routing = True, None
        return twin

    def train_mode(self) -> None:
        """As `eval_mode`, but adapters drop inputs out."""
        self.eval_mode()
        dropping(self.model)

    def eval_mode(self) -> None:
        """No dropout, so that logprobs are those of the rollout; checkpointed layers stay
        checkpointed."""
        self.model.eval()
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True

    def packed_lines(self) -> contextlib.AbstractContextManager[None]:
        """Tree attention inside the block; recomputation in a backward pass must be inside too."""
        return self._attending(tree_attention.NAME)

    @contextlib.contextmanager
    def _attending(self, name: str) -> Iterator[None]:
        config = self.model.config
        usual = config._attn_implementation
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = usual

    @contextlib.contextmanager
    def attention_for(self, batch: MicroBatch) -> Iterator[None]:
        """What forward and backward of this batch must run inside."""
        with contextlib.ExitStack() as stack:
            if self.placed.context is not None:
                stack.enter_context(self._attending(context_parallel.NAME))
            elif batch.segments:
                stack.enter_context(self.packed_lines())
            if self.without_adapters:
                stack.enter_context(adapters_off(self.model))
            if self.routing is not None:
                stack.enter_context(self.routing.around(batch, self.device))
            yield

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states that predict the scored tokens, [N, H]. Needs a head."""
        output = self.placed.base_output(**self._inputs(batch)).last_hidden_state
        return self._scored(output, batch)

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """The model's own logits at the scored tokens, [N, V] float32; all logits exist
        meanwhile."""
        return self._scored(self.model(**self._inputs(batch)).logits, batch).float()

    def idle(self) -> torch.Tensor:
        """A pass over a few tokens that means nothing, which ranks without a micro-batch make
        because the others make theirs; 0 with a gradient of 0."""
        inputs = self._for_ids(_probe_ids(self.model, 4, self.device))
        with contextlib.ExitStack() as stack:
            if self.placed.context is not None:
                stack.enter_context(self._attending(context_parallel.NAME))
            output = self.placed.base_output(**inputs).last_hidden_state
        return output.float().sum() * 0

    def _scored(self, values_BTX: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        if self.placed.context is not None:
            width = batch.input_ids_BT.shape[1]
            values_BTX = self.placed.context.together(values_BTX)[:, :width]
        index_N = batch.hidden_index_N.to(self.device)
        return values_BTX.flatten(0, 1).index_select(0, index_N)

    def _for_ids(self, ids_BT: torch.Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"attention_mask": None, "use_cache": False}
        context = self.placed.context
        if context is not None:
            length = context.padded(ids_BT.shape[1])
            own = context.positions(length).to(self.device)
            ids_BT = torch.nn.functional.pad(ids_BT, (0, length - ids_BT.shape[1]))[:, own]
            inputs |= {"position_ids": own[None], "context_parallel": context}
        return {"input_ids": ids_BT, **inputs}

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        inputs = self._for_ids(batch.input_ids_BT.to(self.device))
        if batch.position_ids_BT is not None:
            inputs["position_ids"] = batch.position_ids_BT.to(self.device)
        if batch.segments:
            inputs["tree_line"] = batch.segments
        for name, value in (batch.media or {}).items():
            kind = self.placed.dtype if value.is_floating_point() else value.dtype
            inputs[name] = value.to(self.device, kind)
        return inputs

    @torch.no_grad()
    def _check_splitting(self) -> None:
        """Refuse a model that gives other hidden states when each rank has a part of a sequence.

        All ranks come to the same end.
        """
        context = self.placed.context
        assert context is not None
        ids = _probe_ids(self.model, context.padded(9), self.device)
        run = self._base()
        expected = _output(run(input_ids=ids, attention_mask=None, use_cache=False))
        try:
            with self._attending(context_parallel.NAME):
                own = _output(run(**self._for_ids(ids)))
            reason = "" if _agree(context.together(own), expected) else "other hidden states"
        except _UNUSABLE as error:
            self.placed.broken()
            reason = str(error)
        if reason:
            raise ConfigError(
                f"{type(self.model).__name__} can't split sequences over context parallel ranks: "
                f"{reason}; use --context-parallel-size 1 (TOML: trainer.context_parallel_size)"
            )

    def _base(self) -> Callable[..., Any]:
        return self.placed.base_output if self._head is not None else self.model

    @torch.no_grad()
    def _check_packing(self) -> tuple[bool, str]:
        """Whether a packed line of two trees gives each sequence what it gets alone."""
        prompts, responses = ((0, 6), (15, 1)), (((6, 5), (11, 4)), ((16, 2), (18, 6)))
        ids = _probe_ids(self.model, 24, self.device)
        positions = torch.zeros(1, 24, dtype=torch.long)
        segments: list[Segment] = []
        alone: list[list[int]] = []
        for (start, length), own in zip(prompts, responses, strict=True):
            positions[0, start : start + length] = torch.arange(length)
            segments.append(Segment(start, length))
            for own_start, own_length in own:
                segments.append(Segment(own_start, own_length, start, length))
                positions[0, own_start : own_start + own_length] = length + torch.arange(own_length)
                spans = (*range(start, start + length), *range(own_start, own_start + own_length))
                alone.append(list(spans))
        run = self._base()
        try:
            with self.packed_lines():
                line = _output(
                    run(
                        input_ids=ids,
                        position_ids=positions.to(self.device),
                        attention_mask=None,
                        use_cache=False,
                        tree_line=tuple(segments),
                    )
                )
        except _UNUSABLE as error:
            self.placed.broken()
            return False, f"packed lines fail: {error}"
        for span in alone:
            expected = _output(run(input_ids=ids[:, span], attention_mask=None, use_cache=False))
            if not _agree(line[:, span], expected):
                return False, "packed lines give other hidden states than sequences alone"
        return True, "packed lines agree with sequences alone"


def attention_window(config: Any) -> int | None:
    """The fewest tokens that any layer may look back; None: all."""
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if getattr(config, "use_sliding_window", True) is False:
        windows[0] = None
    return min((int(window) for window in windows if window), default=None)


@dataclass(frozen=True, slots=True)
class HeadOf:
    """A linear head whose weights are where the model has them."""

    module: torch.nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def now(self) -> Head:
        """With its weights as they are now."""
        return Head(self.module.weight, self.module.bias, self.scale, self.softcap)


@torch.no_grad()
def find_head(own: Placed) -> tuple[HeadOf | None, str]:
    """How the model turns the last hidden state into logits, checked; None and the reason if
    unknown."""
    model = own.model
    module = model.get_output_embeddings()
    if not isinstance(module, torch.nn.Linear) or model.base_model is model:
        return None, "the model has no linear output embedding over a base model"
    config = model.config.get_text_config()
    head = HeadOf(
        module,
        scale=float(getattr(config, "logit_scale", None) or 1.0)
        / float(getattr(config, "logits_scaling", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    seen: list[torch.Tensor] = []

    def magnify(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # Small random weights give small logits, at which a cap would not show.
        raw = torch.nn.functional.linear(inputs[0], module.weight).abs().max().clamp_min(1e-6)
        seen.extend((inputs[0], inputs[0] * (50 / raw)))
        return (seen[-1],)

    ids = _probe_ids(model, 6, own.device)
    hook = module.register_forward_pre_hook(magnify)
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    hidden = own.base_output(input_ids=ids, use_cache=False).last_hidden_state
    if not seen or not _agree(seen[0], hidden):
        return None, "the head is not applied to the base model's last hidden state as it is"
    if not _agree(_head_logits(seen[1], head.now()), logits):
        return None, "the head's logits are changed in a way not known here"
    return head, "head(base(x)) agrees with the model's logits"


def _head_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, head.weight_VH, head.bias_V).float() * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def _probe_ids(model: Any, count: int, device: torch.device) -> torch.Tensor:
    vocab = model.get_input_embeddings().weight.shape[0]
    # Spread over the vocabulary, without drawing from the run's random state.
    ids = (torch.arange(count) * 7919 + 13) % vocab
    return ids[None].to(device)


def _output(output: Any) -> torch.Tensor:
    found = getattr(output, "last_hidden_state", None)
    result: torch.Tensor = output.logits if found is None else found
    return result


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    share = 1e-4 if a.dtype == b.dtype == torch.float32 else 3e-2
    bound = share * b.float().abs().max().clamp_min(1e-6)
    return bool((a.float() - b.float()).abs().max() <= bound)
