"""The trainers' contract on Megatron, in every way of splitting: the steps of one process of the
torch backend. On a CPU over gloo, see `tests.megatron_shim`."""

import os
from dataclasses import asdict

import pytest

from tests.contract.ranks import Ranks
from tests.contract.test_trainer_contract import (
    HERE,
    Row,
    alone,
    models,
    same_metrics,
    same_weights,
)
from tests.contract.trained import CASES, Case, settings_of

__all__ = ["alone", "models"]
MAKE = "tests.contract.megatron_made:megatron"
TP = {"tensor_model_parallel_size": 2}
SOME = ("grpo", "minibatches and KL", "sequences")
MOE = "Qwen3Moe"
ROWS = {
    "1 rank": Row(MAKE, 1),
    "tp=2 with sp": Row(MAKE, 2, {**TP, "sequence_parallel": True}),
    "tp=2": Row(MAKE, 2, TP, SOME),
    "pp=2": Row(MAKE, 2, {"pipeline_model_parallel_size": 2}, SOME),
    "cp=2": Row(MAKE, 2, {"context_parallel_size": 2}, SOME),
    "dp=2, distributed optimizer": Row(MAKE, 2, {}),
    "dp=2": Row(MAKE, 2, {"use_distributed_optimizer": False}, ("grpo",)),
    "moe, 1 rank": Row(MAKE, 1, {}, ("grpo",), MOE),
    "moe, ep=2": Row(MAKE, 2, {"expert_model_parallel_size": 2}, SOME, MOE),
}
PAIRS = [(row, case) for row, its in ROWS.items() for case in its.cases]


@pytest.fixture(scope="module")
def groups():
    with pytest.MonkeyPatch.context() as patch, Ranks(1) as one, Ranks(2) as two:
        # megatron-core compiles small functions when it is imported: seconds for nothing here.
        patch.setitem(os.environ, "TORCHDYNAMO_DISABLE", "1")
        patch.setitem(os.environ, "CUDA_DEVICE_MAX_CONNECTIONS", "1")
        yield {1: one, 2: two}


@pytest.mark.parametrize(("row", "case"), PAIRS)
def test_it_makes_the_steps_of_one_process(row, case, groups, models, alone):
    row = ROWS[row]
    told = Case(**models(row.architecture), settings=settings_of(case), layout=row.layout)
    ranks = groups[row.world].call(f"{HERE}:trained", make=row.make, case=asdict(told))
    expected = alone(row.architecture, case)
    for rank in ranks:
        same_metrics(rank["metrics"], expected["metrics"])
    same_weights(ranks[0]["weights"], expected["weights"])


assert set(CASES) >= set(SOME)
