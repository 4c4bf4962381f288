"""Clusters to simulate: who gets which devices comes from the run's own plan, speeds from a model's
sizes and a GPU's data sheet.

    decode step    weights / bandwidth + sequences x max(2 P / compute, their KV cache / bandwidth)
    training       8 P floating-point operations per token: forward 2 P, backward 4 P, and 2 P for
                   the logprobs before the step
    publish        weights / link + 0.5 s

P: parameters that a token uses. All are first-order: they leave out what overlaps badly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.simulated_engines import EngineSpeed
from benchmarks.simulated_work import Machine
from dovetail.config.resolve import resolve
from dovetail.config.size_rules import size_rules
from dovetail.runtime.parameters import ParameterCount
from dovetail.runtime.plan import Cluster, Plan, plan
from dovetail.runtime.shape import ModelShape
from dovetail.types import ConfigError

NODE = 8
_TRAIN_FIXED_S = 1.0
"""Optimizer, gathers that nothing hides, logging."""
_PUBLISH_FIXED_S = 0.5


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says, and how much of it is reached."""

    flops: float
    """bfloat16, dense, per second."""
    bandwidth: float
    """Bytes per second of its memory."""
    memory: float
    link: float
    """Bytes per second into one node."""
    host_link: float
    """Bytes per second to CPU memory."""
    train_share: float = 0.4
    decode_share: float = 0.6


GPUS = {"h100": Gpu(989e12, 3.35e12, 80e9, 50e9, 50e9)}
"""NVIDIA H100 SXM data sheet: 989 TFLOPS, 3.35 TB/s; 400 Gbit/s per node; PCIe 5 x16."""


@dataclass(frozen=True)
class Model:
    """Sizes that speeds follow from."""

    shape: ModelShape
    count: ParameterCount

    @property
    def active(self) -> float:
        """Parameters that a token uses."""
        own = self.shape
        routed = self.count.experts * (own.experts_per_token / own.experts if own.experts else 0)
        return self.count.layers + self.count.other + (self.count.head or 0) + routed

    @property
    def weight_bytes(self) -> float:
        """In bfloat16."""
        return 2.0 * self.count.total

    @property
    def kv_bytes(self) -> float:
        """Of one token."""
        return 2.0 * (self.shape.kv_elements or 0)


def _model(config: Mapping[str, Any]) -> Model:
    """Counted by hand for gated MLPs and grouped-query attention without biases."""
    shape = ModelShape.from_config(config)
    hidden, head, layers = shape.hidden or 0, shape.head_dim or 0, shape.layers or 0
    heads, kv, experts = shape.heads or 0, shape.kv_heads or 0, shape.experts or 0
    attention = 2 * hidden * (heads + kv) * head + 2 * hidden + 2 * head
    mlp = hidden * experts if experts else 3 * hidden * (shape.intermediate or 0)
    ends = hidden * (shape.vocab or 0)
    return Model(
        shape,
        ParameterCount(
            embedding=ends,
            head=ends,
            layers=layers * (attention + mlp),
            experts=layers * experts * 3 * hidden * shape.expert_intermediate,
            other=hidden,
            num_layers=layers,
        ),
    )


MODELS = {
    "8b": _model(
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        }
    ),
    "30b-a3b": _model(
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        }
    ),
}
"""The shapes of Qwen3-8B and Qwen3-30B-A3B."""


@dataclass(frozen=True)
class Setting:
    """One cluster and what runs on it."""

    devices: int
    model: Model
    gpu: Gpu
    per_engine: int = 1
    prompt_tokens: int = 512
    mean_tokens: float = 2000.0
    """Of a response."""
    trainer_share: float | None = None
    """Of the devices (disaggregated); None: what keeps both sides about equally busy."""


def placed(setting: Setting, colocated: bool) -> Plan:
    """The plan of a run on these devices, refused as a run's would be.

    Raises:
        ConfigError: it can't be.
    """
    node = min(NODE, setting.devices)
    nodes = setting.devices // node
    flags = ["--rollout-engine", "vllm", "--rollout-num-gpus-per-engine", str(setting.per_engine)]
    if colocated:
        flags += ["--colocate", "--actor-num-nodes", str(nodes)]
        flags += ["--actor-num-gpus-per-node", str(node)]
    else:
        whole, each = trainer_nodes(setting)
        flags += ["--mode", "disaggregated", "--actor-num-nodes", str(whole)]
        flags += ["--actor-num-gpus-per-node", str(each)]
        flags += ["--rollout-num-gpus", str(setting.devices - whole * each)]
    config = resolve([], flags).config
    problems = list(size_rules(config))
    if problems:
        raise ConfigError("\n".join(problems))
    return plan(config, Cluster(True, (node,) * nodes), setting.model.shape)


def trainer_nodes(setting: Setting) -> tuple[int, int]:
    """Nodes of the trainer, and devices of each that it takes."""
    share = setting.trainer_share
    if share is None:
        tokens = setting.mean_tokens
        train = 8 * setting.model.active / (setting.gpu.flops * setting.gpu.train_share)
        train *= 1 + setting.prompt_tokens / tokens
        speed = _engine_speed(setting)
        running = max(1, speed.max_running // 2)
        generate = speed.step_s(running) / running * setting.per_engine
        share = train / (train + generate)
    if setting.devices >= 2 * NODE:
        nodes = setting.devices // NODE
        return min(nodes - 1, max(1, round(nodes * share))), NODE
    step = setting.per_engine
    most = setting.devices - step
    left = max(step, round((setting.devices - setting.devices * share) / step) * step)
    return 1, max(1, setting.devices - min(left, most) if most else 1)


def machine_of(setting: Setting, made: Plan, **speeds: float) -> Machine:
    """The plan's devices with speeds; `speeds` replaces fields of `Machine`."""
    model, gpu = setting.model, setting.gpu
    colocated = made.mode == "colocated"
    ranks = len(made.trainer_ranks)
    train = 8 * model.active / (gpu.flops * gpu.train_share)
    states = 16.0 * model.count.total / ranks
    moved = states + model.weight_bytes / setting.per_engine
    return replace(
        Machine(
            engines=len(made.engines),
            engine=_engine_speed(setting),
            trainer_groups=made.layout.dp,
            train_token_s=train * made.layout.dp / ranks,
            engine_devices=len(made.engines) * setting.per_engine,
            trainer_devices=ranks,
            train_fixed_s=_TRAIN_FIXED_S,
            publish_s=model.weight_bytes / gpu.link + _PUBLISH_FIXED_S,
            turns=colocated,
            switch_s=2 * moved / gpu.host_link if colocated else 0.0,
        ),
        **speeds,  # type: ignore[arg-type]
    )


def _engine_speed(setting: Setting) -> EngineSpeed:
    model, gpu, size = setting.model, setting.gpu, setting.per_engine
    context = setting.prompt_tokens + setting.mean_tokens / 2
    reads = gpu.bandwidth * gpu.decode_share * size
    room = 0.9 * gpu.memory * size - model.weight_bytes
    if room <= 0:
        raise ConfigError(
            f"{model.weight_bytes / 1e9:.0f} GB of weights do not fit into an engine of {size} "
            "devices; raise --per-engine"
        )
    compute = 2 * model.active / (gpu.flops * gpu.train_share * size)
    longest = setting.prompt_tokens + setting.mean_tokens
    return EngineSpeed(
        decode_base_s=model.weight_bytes / reads,
        decode_sequence_s=max(compute, model.kv_bytes * context / reads),
        prompt_s=compute * setting.prompt_tokens,
        max_running=max(1, min(512, int(room / (model.kv_bytes * longest)))),
    )
