"""The trainers' contract on Megatron, in every way of splitting: the steps of one process of the
torch backend. On a CPU over gloo, see `tests.megatron_shim`."""

import os
from dataclasses import asdict

import pytest

from tests.contract.ranks import Ranks
from tests.contract.special import REPLAY, specially
from tests.contract.test_trainer_contract import HERE, Row, same_metrics, same_weights
from tests.contract.trained import Case, settings_of, trained, write_models

pytestmark = pytest.mark.xdist_group("megatron ranks")

MAKE = "tests.contract.megatron_made:megatron"
LOW, LOW_ALONE = "tests.contract.megatron_made:low", "tests.contract.torch_made:low_alone"
TP, SP = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}
PP, CP = {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
VPP = {**PP, "num_layers_per_virtual_pipeline_stage": 1}
SOME = ("grpo", "minibatches and KL", "sequences")
MOE, DEEP = "Qwen3Moe", "Qwen3, 4 layers"
ROWS = {
    "1 rank": Row(MAKE, 1),
    "tp=2 with sp": Row(MAKE, 2, {**TP, **SP}),
    "tp=2": Row(MAKE, 2, TP, SOME),
    "pp=2": Row(MAKE, 2, PP, SOME),
    "pp=2, interleaved": Row(MAKE, 2, VPP, SOME, architecture=DEEP),
    "cp=2": Row(MAKE, 2, CP, SOME),
    "dp=2, distributed optimizer": Row(MAKE, 2, {}),
    "dp=2": Row(MAKE, 2, {"use_distributed_optimizer": False}, ("grpo",)),
    "tp=2 with sp, recomputed": Row(
        MAKE, 2, {**TP, **SP, "gradient_checkpointing": True}, ("minibatches and KL",)
    ),
    "dp=2, overlapped": Row(
        MAKE,
        2,
        {"passed": {"overlap_grad_reduce": "true", "bucket_size": "1000"}},
        ("minibatches and KL",),
    ),
    "Llama, tp=2": Row(MAKE, 2, TP, ("grpo",), architecture="Llama"),
    "Qwen2, pp=2": Row(MAKE, 2, PP, ("grpo",), architecture="Qwen2"),
    "bfloat16, tp=2 with sp": Row(LOW, 2, {**TP, **SP}, ("grpo",), apart=0.1, alone=LOW_ALONE),
    "bfloat16, dp=2": Row(LOW, 2, {}, ("grpo",), apart=0.1, alone=LOW_ALONE),
    "moe, 1 rank": Row(MAKE, 1, {}, ("grpo",), architecture=MOE),
    "moe, ep=2": Row(MAKE, 2, EP, SOME, architecture=MOE),
    "moe, ep=2, tp=2 with sp, etp=1": Row(
        MAKE, 2, {**EP, **TP, **SP, "expert_tensor_parallel_size": 1}, ("grpo",), architecture=MOE
    ),
    "moe, tp=2 with sp": Row(MAKE, 2, {**TP, **SP}, ("grpo",), architecture=MOE),
}
PAIRS = [(row, case) for row, its in ROWS.items() for case in its.cases]


@pytest.fixture(scope="module")
def groups():
    with pytest.MonkeyPatch.context() as patch, Ranks(1) as one, Ranks(2) as two:
        # megatron-core compiles small functions when it is imported: seconds for nothing here.
        patch.setitem(os.environ, "TORCHDYNAMO_DISABLE", "1")
        patch.setitem(os.environ, "CUDA_DEVICE_MAX_CONNECTIONS", "1")
        yield {1: one, 2: two}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of policy and reference by architecture."""
    made = {}

    def of(architecture):
        if architecture not in made:
            name, _, deep = architecture.partition(", ")
            more = {"num_hidden_layers": 4} if deep else {}
            made[architecture] = write_models(tmp_path_factory.mktemp(name), name, **more)
        return made[architecture]

    return of


@pytest.fixture(scope="module")
def alone(models):
    """What one process of the torch backend makes of a case."""
    made = {}

    def of(architecture, case, make=f"{HERE}:alone"):
        key = (architecture, case, make)
        if key not in made:
            told = asdict(Case(**models(architecture), settings=settings_of(case)))
            made[key] = trained(0, 1, make, told)
        return made[key]

    return of


@pytest.mark.parametrize(("row", "case"), PAIRS)
def test_it_makes_the_steps_of_one_process(row, case, groups, models, alone):
    row = ROWS[row]
    told = Case(**models(row.architecture), settings=settings_of(case), layout=row.layout)
    ranks = groups[row.world].call(f"{HERE}:trained", make=row.make, case=asdict(told))
    expected = alone(row.architecture, case, row.alone)
    for rank in ranks:
        same_metrics(rank["metrics"], expected["metrics"], row.apart)
    same_weights(ranks[0]["weights"], expected["weights"], row.apart)


SPECIAL = [
    *[("R2", layout, MOE) for layout in ("1", "tp=2 with sp", "pp=2", "cp=2", "ep=2, recomputed")],
    *[("R3", layout, MOE) for layout in ("pp=2", "tp=2 with sp", "ep=2, recomputed")],
    *[("on logits", layout, "Qwen3") for layout in ("1", "tp=2 with sp", "cp=2", "pp=2", "dp=2")],
]
LAYOUTS = {
    "1": {},
    "dp=2": {},
    "tp=2 with sp": {**TP, **SP},
    "pp=2": PP,
    "cp=2": CP,
    "ep=2, recomputed": {**EP, "gradient_checkpointing": True},
}


@pytest.mark.parametrize(("what", "layout", "architecture"), SPECIAL)
def test_experts_are_replayed_and_losses_see_logits_in_every_layout(
    what, layout, architecture, groups, models
):
    own = {**settings_of("grpo"), **REPLAY.get(what, {})}
    told = {**models(architecture), "settings": own}
    given = {"what": what, "case": {**told, "layout": LAYOUTS[layout]}}
    world = 1 if layout == "1" else 2
    ranks = groups[world].call("tests.contract.special:specially", make=MAKE, **given)
    expected = specially(0, 1, f"{HERE}:alone", told, what)
    for rank in ranks:
        same_metrics(rank["metrics"], expected["metrics"])
    same_weights(ranks[0]["weights"], expected["weights"])
