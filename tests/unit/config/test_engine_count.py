"""How many engines a run starts, and what `args` says of it."""

import pytest

from dovetail.config.engine_count import num_engines
from dovetail.config.resolve import resolve
from dovetail.hooks.args_view import ArgsView

APART = "--mode disaggregated"
PAIRS = "--rollout-engine vllm --rollout-num-gpus-per-engine 2"
TEACHING = "--loss-type sft_loss"
COUNTS = {
    "": 1,
    "--rollout-num-engines 3": 3,
    APART: 1,
    f"{APART} --rollout-num-engines 3": 3,
    f"{APART} --rollout-num-gpus 4": 4,
    f"{APART} --rollout-num-gpus 4 {PAIRS}": 2,
    f"{APART} --rollout-num-engines 3 {PAIRS}": 3,
    "--colocate --actor-num-gpus-per-node 4": 4,
    f"--colocate --actor-num-gpus-per-node 4 {PAIRS}": 2,
    f"--colocate --actor-num-gpus-per-node 1 {PAIRS}": 1,
    "--colocate --actor-num-gpus-per-node 4 --rollout-num-engines 2": 2,
    "--colocate --actor-num-gpus-per-node 4 --rollout-num-gpus 2": 2,
    "--rollout-engine vllm --rollout-external-engine-addrs h:1 h:2": 0,
    TEACHING: 0,
    f"{TEACHING} --eval-prompt-data held rows.jsonl": 1,
    "--debug-train-only": 0,
}


@pytest.mark.parametrize("flags", COUNTS)
def test_engines_of_a_run_and_their_devices_in_args(flags: str) -> None:
    config = resolve([], flags.split()).config
    assert num_engines(config) == COUNTS[flags]
    per_engine = config.runtime.rollout_num_gpus_per_engine
    assert ArgsView(config).rollout_num_gpus == COUNTS[flags] * per_engine
