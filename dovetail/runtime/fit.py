"""Whether a model's heads, layers and experts come out even between the ranks that split them."""

from __future__ import annotations

from collections.abc import Iterator

from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig
from dovetail.runtime.shape import ModelShape
from dovetail.types.errors import ConfigError


def check_fit(config: RunConfig, shape: ModelShape) -> None:
    """Refuse splits of trainer or engines that the model's sizes do not allow.

    Raises:
        ConfigError: with every problem found, one per line.
    """
    if config.runtime.mode == "local":
        return
    problems = [*_trainer(config, shape), *_engines(config, shape)]
    if len(problems) > 1:
        raise ConfigError("\n- ".join([f"{len(problems)} problems in the plan:", *problems]))
    if problems:
        raise ConfigError(problems[0])


def _trainer(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    own = config.trainer
    megatron = own.train_backend == "megatron"
    tp = own.tensor_model_parallel_size
    yield from _heads(shape, tp, "tensor_model_parallel_size", repeats_kv=megatron)
    if shape.experts:
        etp = own.expert_tensor_parallel_size or tp
        width, leaf = shape.expert_intermediate, "expert_tensor_parallel_size"
        yield from _even("inner width of an expert", width, etp if megatron else tp, leaf)
    else:
        width, leaf = shape.intermediate or 0, "tensor_model_parallel_size"
        yield from _even("inner width of an MLP", width, tp, leaf)
    pp, stage = own.pipeline_model_parallel_size, own.num_layers_per_virtual_pipeline_stage
    yield from _even("layers", shape.layers, pp, "pipeline_model_parallel_size")
    if shape.layers is not None and stage is not None and shape.layers % (pp * stage):
        yield (
            f"the model's {shape.layers} layers can't be interleaved: pipeline_model_parallel_size "
            f"{pp} x num_layers_per_virtual_pipeline_stage {stage} = {pp * stage}; "
            f"{cure('num_layers_per_virtual_pipeline_stage', 1)}"
        )
    ep = own.expert_model_parallel_size
    if ep > 1 and not shape.experts:
        yield (
            f"expert_model_parallel_size {ep} splits the experts of a layer, and the model has "
            f"none; {cure('expert_model_parallel_size', 1)}"
        )
    yield from _even("experts", shape.experts, ep, "expert_model_parallel_size")
    if megatron and shape.experts and tp > 1 and not own.sequence_parallel:
        yield (
            f"megatron-core trains experts with tensor_model_parallel_size {tp} only under "
            f"sequence parallelism; add {cure('sequence_parallel', True)}"
        )


def _engines(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    size = config.runtime.rollout_num_gpus_per_engine
    if not config.engine.rollout_external_engine_addrs:
        yield from _heads(shape, size, "rollout_num_gpus_per_engine", repeats_kv=True)


def _heads(shape: ModelShape, size: int, leaf: str, *, repeats_kv: bool) -> Iterator[str]:
    """`repeats_kv`: several ranks may hold the same key and value head."""
    yield from _even("attention heads", shape.heads, size, leaf)
    kv = shape.kv_heads
    if kv is None or kv == shape.heads or not kv % size or (repeats_kv and not size % kv):
        return
    yield (
        f"the model's {kv} key-value heads can't be shared out to {size} ranks; have {leaf} divide "
        f"{kv}: {cure(leaf, _largest_divisor(kv, size))}"
    )


def _even(what: str, count: int | None, size: int, leaf: str) -> Iterator[str]:
    if count and count % size:
        yield (
            f"the model's {count} {what} can't be shared out to {size} ranks; have {leaf} divide "
            f"it: {cure(leaf, _largest_divisor(count, size))}"
        )


def _largest_divisor(count: int, at_most: int) -> int:
    return next(size for size in range(min(count, at_most), 0, -1) if count % size == 0)
