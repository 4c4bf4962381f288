"""Expected memory: hand-worked numbers, and what torch really keeps."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from dovetail.config.resolve import resolve
from dovetail.config.run import RunConfig
from dovetail.runtime.layout import layout
from dovetail.runtime.memory import (
    Memory,
    elements_of_layer,
    engine_memory,
    frozen_memory,
    trainer_memory,
)
from dovetail.runtime.parameters import ParameterCount, count_parameters
from dovetail.runtime.plan import Cluster, plan
from dovetail.runtime.roles import peaks, roles, table
from dovetail.runtime.shape import ModelShape

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
COUNT = ParameterCount(embedding=1000, head=1000, layers=8000, other=0, num_layers=8)
SHAPE = ModelShape(layers=8, hidden=10, heads=4, kv_heads=2, head_dim=5, intermediate=30, vocab=100)


def _config(flags: str) -> RunConfig:
    return resolve([], flags.split()).config


def _states(flags: str, stage: int = 0, count: ParameterCount = COUNT) -> tuple[float, ...]:
    config = _config(flags)
    made = trainer_memory(config, layout(config), SHAPE, count, stage)
    return made.weights, made.gradients, made.optimizer


def test_one_rank_holds_18_bytes_per_parameter_in_bfloat16_and_16_in_float32() -> None:
    assert _states("") == (20_000, 40_000, 120_000)
    assert _states("--dtype float32") == (40_000, 40_000, 80_000)


def test_fsdp_shards_everything_and_gathers_two_layers_and_both_ends() -> None:
    # 40 kB of float32 over 4 ranks, and (2 x 1000 + 1000 + 1000) gathered in 2 bytes.
    assert _states("--colocate --actor-num-gpus-per-node 4") == (18_000, 10_000, 20_000)
    # Two copies: 2 shards each.
    copies = "--colocate --actor-num-gpus-per-node 4 --dp-replicate-size 2"
    assert _states(copies) == (28_000, 20_000, 40_000)
    assert _states("--colocate --actor-num-gpus-per-node 4 --fsdp-cpu-offload") == (8_000, 0, 0)


def test_megatron_has_6_and_12_over_d_bytes_per_parameter() -> None:
    flags = "--colocate --train-backend megatron --actor-num-gpus-per-node 4"
    assert _states(flags) == (20_000, 40_000, 30_000)
    assert _states(f"{flags} --no-use-distributed-optimizer") == (20_000, 40_000, 120_000)
    # Stages of 4000; the first has the embedding, the last the head; optimizers over 2 ranks.
    stages = f"{flags} --pipeline-model-parallel-size 2"
    assert _states(stages) == _states(stages, 1) == (10_000, 20_000, 30_000)
    split = f"{flags} --tensor-model-parallel-size 2"
    assert _states(split) == (10_000, 20_000, 30_000)


def test_experts_are_split_over_ranks_of_their_own() -> None:
    count = ParameterCount(layers=1000, experts=16_000, num_layers=2)
    flags = (
        "--colocate --train-backend megatron --actor-num-gpus-per-node 4 "
        "--expert-model-parallel-size 2"
    )
    # 1000 dense over 4 ranks, 8000 of experts over the 2 that hold the same.
    assert _states(flags, 0, count) == (18_000, 36_000, 12 * (250 + 4_000))


def test_adapters_alone_have_gradients_and_moments() -> None:
    count = ParameterCount(layers=1000, adapters=100)
    assert _states("--lora-rank 2", 0, count) == (2_000, 400, 1_200)


def test_a_reference_is_weights_alone() -> None:
    config = _config("--colocate --actor-num-gpus-per-node 4")
    assert frozen_memory(config, layout(config), COUNT) == Memory(weights=5_000)


def test_keys_and_values_are_counted_per_kv_head() -> None:
    flags = (
        "--mode disaggregated --rollout-num-gpus 4 --rollout-num-gpus-per-engine 2 --dtype float32 "
        "--rollout-engine vllm --rollout-batch-size 3 --rollout-max-response-len 100"
    )
    config = _config(flags)
    made = engine_memory(config, plan(config, Cluster()), SHAPE, COUNT)
    # 2 x 8 layers x 1 of 2 heads x 5 x 4 bytes; 2 of 3 sequences on one of the two engines.
    assert made == Memory(weights=20_000, kv_cache=2 * 100 * 320)


def test_an_engine_that_shares_tensors_has_no_weights_of_its_own() -> None:
    config = _config("--engine-kv-tokens 10 --dtype float32")
    made = engine_memory(config, plan(config, Cluster()), SHAPE, COUNT)
    assert made == Memory(kv_cache=10 * 640)
    config = _config("--engine-kv-tokens 10 --dtype float32 --max-lag 1")
    ahead = engine_memory(config, plan(config, Cluster()), SHAPE, COUNT)
    assert ahead == Memory(weights=COUNT.total * 4, kv_cache=10 * 640)


def test_those_who_take_turns_need_the_larger_of_both() -> None:
    flags = "--colocate --actor-num-gpus-per-node 2 --rollout-engine vllm"
    for more, together in ((flags, max), (f"{flags} --no-offload-train", sum)):
        config = _config(more)
        made = plan(config, Cluster(True, (2,)))
        found = roles(config, made, SHAPE, COUNT)
        need = together([role.memory.total for role in found])
        assert list(peaks(config, made, found).values()) == [need, need]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_activations_are_what_a_forward_pass_keeps(kind: Any, dtype: torch.dtype) -> None:
    made = kind(intermediate_size=768, **SIZES)
    model = AutoModelForCausalLM.from_config(made, dtype=dtype)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = 256
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    assert hidden is not None
    per_layer = sum(one.nbytes() for one in kept.values()) / tokens / 4 / dtype.itemsize
    expected = elements_of_layer(
        ModelShape.from_config(made.to_dict()), dtype.itemsize, kind is Qwen3Config
    )
    # The last norm and statistics of norms are not counted.
    assert 0.94 < sum(expected) / per_layer < 1.0


@pytest.mark.parametrize(
    "made",
    [
        Qwen3Config(intermediate_size=768, tie_word_embeddings=True, **SIZES),
        Qwen3MoeConfig(moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, **SIZES),
    ],
)
def test_parameters_are_counted_without_numbers(made: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    count = count_parameters(model, lora_rank=2, target_modules=["q_proj"])
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.embedding == 512 * 256 and count.normed_heads and count.num_layers == 4
    assert count.head == (0 if made.tie_word_embeddings else 512 * 256)
    assert count.experts == (4 * 4 * 3 * 256 * 64 if "Moe" in type(made).__name__ else 0)
    assert count.adapters == 4 * 2 * (256 + 256)


def test_the_table_has_a_row_per_role_and_says_what_is_too_little() -> None:
    flags = (
        "--mode disaggregated --actor-num-nodes 2 --actor-num-gpus-per-node 2 --rollout-num-gpus 4 "
        "--train-backend megatron --pipeline-model-parallel-size 2 --use-kl-loss "
        "--rollout-engine vllm"
    )
    config, cluster = _config(flags), Cluster(True, (2, 2, 4), memory_bytes=100_000)
    text = table(config, plan(config, cluster, SHAPE), cluster, SHAPE, COUNT)
    heads = [line.partition("  ")[0] for line in text.splitlines()]
    assert heads[3:8] == [
        "MiB of each device",
        "trainer, stage 0",
        "reference, stage 0",
        "trainer, stage 1",
        "reference, stage 1",
    ]
    assert "node 0: 0-1 " in text and "engine 0-3          node 2: 0-3 " in text
    assert "too little memory is likely" in text
