"""Megatron's training state goes on where it stopped, also under another layout."""

from dataclasses import asdict

import pytest

from tests.contract.test_megatron_contract import (
    CP,
    DEEP,
    EP,
    MAKE,
    MOE,
    PP,
    SP,
    TP,
    VPP,
    alone,
    groups,
    models,
)
from tests.contract.test_trainer_contract import HERE, same_metrics, same_weights
from tests.contract.trained import Case, settings_of

pytestmark = pytest.mark.xdist_group("megatron checkpoints")

__all__ = ["alone", "groups", "models"]
ONE = {}
PLAIN = {"use_distributed_optimizer": False}
CHANGES = {
    "1 rank to 1 rank": ((1, ONE), (1, ONE), "Qwen3"),
    "tp=2 with sp to pp=2": ((2, {**TP, **SP}), (2, PP), "Qwen3"),
    "pp=2 to dp=2": ((2, PP), (2, ONE), "Qwen3"),
    "dp=2 to tp=2": ((2, ONE), (2, TP), "Qwen3"),
    "cp=2 to 1 rank": ((2, CP), (1, ONE), "Qwen3"),
    "interleaved to tp=2": ((2, VPP), (2, TP), DEEP),
    "plain optimizer, tp=2 to dp=2": ((2, {**TP, **PLAIN}), (2, PLAIN), "Qwen3"),
    "experts, ep=2 to ep=2": ((2, EP), (2, EP), MOE),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_saved_state_goes_on_under_another_layout(change, groups, models, alone, tmp_path):
    (world, layout), (later_world, later_layout), architecture = CHANGES[change]
    case = "minibatches and KL"

    def run(world, layout, **how):
        told = Case(**models(architecture), settings=settings_of(case), layout=layout)
        return groups[world].call(f"{HERE}:trained", make=MAKE, case=asdict(told), **how)

    saved = run(world, layout, steps=(0, 2), save_into=str(tmp_path / "state"))
    load_from = (str(tmp_path / "state"), saved[0]["facts"])
    ranks = run(later_world, later_layout, steps=(2, 3), load_from=load_from)
    expected = alone(architecture, case)
    for rank in ranks:
        same_metrics(rank["metrics"], expected["metrics"][2:])
    same_weights(ranks[0]["weights"], expected["weights"])


def test_a_state_is_saved_before_the_first_step_too(groups, models, alone, tmp_path):
    told = asdict(Case(**models("Qwen3"), settings=settings_of("grpo"), layout=TP))
    how = {"make": MAKE, "case": told}
    saved = groups[2].call(
        f"{HERE}:trained", **how, steps=(0, 0), save_into=str(tmp_path / "state")
    )
    load_from = (str(tmp_path / "state"), saved[0]["facts"])
    ranks = groups[2].call(f"{HERE}:trained", **how, load_from=load_from)
    expected = alone("Qwen3", "grpo")
    same_metrics(ranks[0]["metrics"], expected["metrics"])
    same_weights(ranks[0]["weights"], expected["weights"])
