"""Sizes of a cluster that can't be split as asked."""

import pytest

from dovetail.config.resolve import resolve
from dovetail.config.size_rules import size_rules

FOUR = "--colocate --actor-num-gpus-per-node 4"
EIGHT = "--colocate --actor-num-gpus-per-node 8 --train-backend megatron"
APART = "--mode disaggregated"


def _problems(flags: str) -> list[str]:
    return list(size_rules(resolve([], flags.split()).config))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            f"{FOUR} --tensor-model-parallel-size 3",
            "4 trainer ranks (actor_num_nodes 1 x actor_num_gpus_per_node 4) can't be split into "
            "groups of 3: tensor 3 x pipeline 1 x context 1; have a multiple of 3 ranks",
        ),
        (
            f"{FOUR} --context-parallel-size 3",
            "or lower --context-parallel-size (TOML: trainer.context_parallel_size)",
        ),
        (
            f"{FOUR} --dp-replicate-size 3",
            "dp_replicate_size 3 does not divide the 4 data-parallel",
        ),
        (f"{FOUR} --pipeline-model-parallel-size 2", "is what train_backend 'megatron' does"),
        (f"{FOUR} --expert-model-parallel-size 2", "is what train_backend 'megatron' does"),
        (f"{EIGHT} --fsdp-cpu-offload", "fsdp_cpu_offload True is what train_backend 'torch' does"),
        (f"{EIGHT} --dp-replicate-size 2", "is what train_backend 'torch' does"),
        (f"{EIGHT} --expert-model-parallel-size 3", "into groups of 3 for the experts"),
        (f"{FOUR} --sequence-parallel", "tensor_model_parallel_size is 1"),
        (
            f"{EIGHT} --num-layers-per-virtual-pipeline-stage 2",
            "pipeline_model_parallel_size is 1",
        ),
        (f"{FOUR} --num-gpus-per-node 2", "is above num_gpus_per_node 2"),
        (f"{APART} --rollout-num-gpus-per-engine 2", "the embedded engine has one device"),
        (
            f"{APART} --rollout-engine vllm --rollout-num-gpus-per-engine 2 --rollout-num-gpus 3",
            "rollout_num_gpus 3 is no multiple of rollout_num_gpus_per_engine 2; "
            "--rollout-num-gpus 2",
        ),
        (
            f"{APART} --rollout-num-gpus 4 --rollout-num-engines 3",
            "rollout_num_gpus 4 / rollout_num_gpus_per_engine 1 gives 4 engines, and "
            "rollout_num_engines says 3",
        ),
        (
            f"{APART} --rollout-engine vllm --rollout-num-gpus-per-engine 8 --num-gpus-per-node 4",
            "rollout_num_gpus_per_engine 8 is above the 4 devices of a node",
        ),
        (f"{APART} --debug-rollout-only", "'disaggregated' is about where the trainer's ranks"),
        (
            "--colocate --debug-rollout-only",
            "debug_rollout_only trains nothing, and mode 'colocated'",
        ),
        (f"{FOUR} --rollout-num-engines 5", "colocated engines are to have 5 devices"),
        (
            f"{FOUR} --rollout-engine vllm --rollout-external-engine-addrs h:1",
            "names engines that run already",
        ),
    ],
)
def test_what_does_not_come_out_even_is_told_with_its_numbers(flags: str, expected: str) -> None:
    (problem,) = _problems(flags)
    assert expected in problem


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 3 --rollout-num-gpus-per-engine 2",
        "--debug-rollout-only",
        f"{FOUR} --tensor-model-parallel-size 2 --sequence-parallel --dp-replicate-size 2",
        f"{EIGHT} --expert-model-parallel-size 8 --tensor-model-parallel-size 2 "
        "--sequence-parallel --expert-tensor-parallel-size 1",
        f"{APART} --rollout-num-gpus 4 --rollout-num-engines 4",
        f"{FOUR} --rollout-num-engines 2",
    ],
)
def test_what_comes_out_even_is_let_pass(flags: str) -> None:
    assert _problems(flags) == []
