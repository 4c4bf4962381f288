"""The memory that each role is expected to need, from a model's sizes alone.

Model states, in bytes per trained parameter (P parameters; e: bytes of `dtype`, 2 or 4):

                  weights   gradients   optimizer (float32 master and two Adam moments)
    bfloat16         2          4          4 + 8
    float32          4          4          8, the weights are their own master

which is the count of ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (arXiv
1910.02054, section 3.1: 2 + 2 + 12) with gradients added up in float32 (2 + 4 + 12). Tensor
parallel ranks divide all of it by tp, pipeline stages hold their layers, expert parallel ranks
divide the experts by ep x etp. Then:

* torch, one rank: all of it.
* torch, several: FSDP2 shards all of it over dp_shard x cp. The weights it keeps are the float32
  masters (`MixedPrecisionPolicy.param_dtype` casts what it gathers), so 4 + 4 + 8 bytes; gathered
  at a time are two layers, embedding and head, in `dtype`. With `fsdp_cpu_offload` a GPU has only
  what is gathered.
* megatron: weights and gradients whole, the optimizer divided by dp x cp under the distributed
  optimizer: 6 + 12/d in bfloat16, 8 + 8/d in float32, as megatron-core's docs
  (docs/api-guide/dist_optimizer.md) have it.

Activations, in elements per token and layer that the backward pass needs (h hidden, a heads and k
key-value heads of size d, f inner width), counted as Reducing Activation Recomputation in Large
Transformer Models (arXiv 2205.05198, section 4.1) does, for RMSNorm, rotary grouped-query attention
without a matrix of scores, a gated MLP and no dropout:

    two norms  3 h each (input, normalised, output); in bfloat16 4 h, the input being float32
    attention  (2 a + 2 k) d (rotated q and k, v, output); norms of q and k: 2 (a + k) d more, or 3
    MLP        4 f (gate, up, activated, product); MoE: 2 h + 4 f for each of a token's experts

which is what transformers' Llama and Qwen3 keep (a test compares). Tensor parallelism divides all
but the h terms (equation 2), sequence parallelism those too (equation 4), context parallelism the
tokens. With recomputation (`gradient_checkpointing`) h per layer stays, and one layer at a time is
whole. Pipeline stage i of p holds p - i micro-batches (1F1B).

The estimate leaves out what a framework takes for itself: the CUDA context, NCCL, fragments of the
allocator, workspaces. Expect 1 to 3 GB more on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.config.run import RunConfig
from dovetail.runtime.layout import Layout
from dovetail.runtime.parameters import ParameterCount
from dovetail.runtime.plan import Plan
from dovetail.runtime.shape import ModelShape

_PIECE_BYTES = 3 * 4 * 4 * 1024**2
"""Logits, their gradient and a temporary of one piece (`dovetail.algorithms.logprobs`)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    kv_cache: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        kept = self.weights + self.gradients + self.optimizer
        return kept + self.activations + self.kv_cache

    def plus(self, other: Memory) -> Memory:
        """Both."""
        return Memory(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.activations + other.activations,
            self.kv_cache + other.kv_cache,
        )


def trainer_memory(
    config: RunConfig, layout: Layout, shape: ModelShape, count: ParameterCount, stage: int = 0
) -> Memory:
    """What one rank of pipeline stage `stage` needs to train the policy."""
    states = _states(config, layout, count, stage)
    return states.plus(Memory(activations=_activations(config, layout, shape, count, stage)))


def frozen_memory(
    config: RunConfig, layout: Layout, count: ParameterCount, stage: int = 0
) -> Memory:
    """What one rank needs for a model that is only asked for logprobs: its share of the weights."""
    dense, experts = _held(layout, count, stage)
    sharded = layout.dp_shard * layout.cp if config.trainer.train_backend == "torch" else 1
    return Memory(weights=(dense + experts) * _element(config) / sharded)


def engine_memory(
    config: RunConfig, plan: Plan, shape: ModelShape, count: ParameterCount
) -> Memory:
    """What one device of an engine needs.

    The KV cache is that of the embedded engine (`engine_memory_gb`, or less where a step needs
    less); vLLM and SGLang take what they may (their own memory fraction), and here it is what the
    engine's part of a step needs when all its responses are as long as they may be.
    """
    size = config.runtime.rollout_num_gpus_per_engine if plan.mode != "local" else 1
    shares = plan.shares_tensors and not plan.has_copy
    weights = 0.0 if shares else count.total * _element(config) / size
    kv_share = min(size, shape.kv_heads or size)
    per_token = (shape.kv_elements or 0) * _element(config) / kv_share
    running = -(-config.samples_per_rollout // max(1, len(plan.engines)))
    needed = running * config.rollout.rollout_max_response_len * per_token
    if config.engine.rollout_engine == "embedded":
        fixed = config.engine.engine_kv_tokens * per_token
        needed = fixed or min(needed, config.engine.engine_memory_gb * 1e9)
    return Memory(weights=weights, kv_cache=needed)


def _states(config: RunConfig, layout: Layout, count: ParameterCount, stage: int) -> Memory:
    """Weights, gradients, optimizer of one rank."""
    element = _element(config)
    dense, experts = _held(layout, count, stage)
    held = dense + experts
    trained = count.adapters / layout.tp if count.adapters else held
    master = 4.0 if element == 2 else 0.0
    if config.trainer.train_backend == "megatron":
        split = config.trainer.use_distributed_optimizer
        over = layout.dp * layout.cp if split else 1
        over_experts = layout.edp if split else 1
        kept = dense / over + experts / over_experts
        return Memory(
            weights=held * element,
            gradients=4.0 * trained,
            optimizer=(master + 8.0) * (trained if count.adapters else kept),
        )
    ranks = layout.dp_shard * layout.cp
    if layout.world == 1:
        return Memory(held * element, 4.0 * trained, (master + 8.0) * trained)
    gathered = _gathered(layout, count) * element
    if config.trainer.fsdp_cpu_offload:
        return Memory(gathered)
    return Memory(4.0 * held / ranks + gathered, 4.0 * trained / ranks, 8.0 * trained / ranks)


def _held(layout: Layout, count: ParameterCount, stage: int) -> tuple[float, float]:
    """Dense parameters and those of experts that the stage has, divided by tensor and expert
    parallelism. Norms, which every tensor parallel rank holds whole, count as divided."""
    first, last = stage == 0, stage == layout.pp - 1
    dense = count.layers / layout.pp
    dense += count.embedding if first else 0
    # A tied head on a stage of its own is a copy of the embedding.
    dense += (count.head or (0 if first else count.embedding)) if last else 0
    dense += count.other if last else 0
    split = layout.ep * layout.etp
    return dense / layout.tp, count.experts / layout.pp / split


def _gathered(layout: Layout, count: ParameterCount) -> float:
    """Parameters that FSDP2 has whole at a time: this layer, the next one, embedding and head."""
    two = 2 * (count.layers + count.experts) / max(1, count.num_layers)
    return (two + count.embedding + count.head) / layout.tp


def _activations(
    config: RunConfig, layout: Layout, shape: ModelShape, count: ParameterCount, stage: int
) -> float:
    """Bytes that the backward passes of the micro-batches under way need."""
    if shape.hidden is None or shape.layers is None:
        return 0.0
    tokens = config.batch.max_tokens_per_gpu / layout.cp
    sequence = layout.tp if config.trainer.sequence_parallel else 1
    whole, split = elements_of_layer(shape, _element(config), count.normed_heads)
    layer = whole / sequence + split / layout.tp
    layers = shape.layers / layout.pp
    in_flight = layout.pp - stage
    kept = layers * layer
    if config.model.gradient_checkpointing:
        kept = layers * shape.hidden / sequence + layer / in_flight
    logits = _PIECE_BYTES if stage == layout.pp - 1 else 0
    return in_flight * kept * tokens * _element(config) + logits


def elements_of_layer(
    shape: ModelShape, element: int, normed_heads: bool = False
) -> tuple[float, float]:
    """Elements of `element` bytes that a layer keeps of a token: those that tensor parallelism
    leaves whole, and those that it divides."""
    hidden, head = shape.hidden or 0, shape.head_dim or 0
    heads, kv = shape.heads or 0, shape.kv_heads or 0
    extra = 1.0 if element == 2 else 0.0
    whole, split = (6.0 + 2 * extra) * hidden, 2.0 * (heads + kv) * head
    if normed_heads:
        split += (2.0 + extra) * (heads + kv) * head
    if shape.experts:
        per_expert = 2.0 * hidden + 4.0 * shape.expert_intermediate
        return whole, split + shape.experts_per_token * per_expert
    return whole, split + 4.0 * (shape.intermediate or 0)


def _element(config: RunConfig) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4
