"""Who lives where: what can't be, and what has no effect."""

import pytest

from dovetail.config.notes import notes
from dovetail.config.placement_rules import placement_rules
from dovetail.config.resolve import resolve


def test_sizes_of_a_cluster_are_told_to_do_nothing_in_one_process() -> None:
    resolved = resolve([], ["--actor-num-gpus-per-node", "8", "--tensor-model-parallel-size", "2"])
    (note,) = [one for one in notes(resolved.config) if "mode local" in one]
    assert note.endswith(": --actor-num-gpus-per-node, --tensor-model-parallel-size")
    assert resolved.config.runtime.trainer_ranks == 8


def test_the_backend_of_miles_and_cosmos_rl_is_torch() -> None:
    assert resolve([], ["--train-backend", "fsdp"]).config.trainer.train_backend == "torch"


_LORA = ["--lora-rank", "4"]
_ON_RANKS = ["--mode", "disaggregated"]


@pytest.mark.parametrize(
    "flags",
    [
        [*_LORA, *_ON_RANKS, "--tensor-model-parallel-size", "2"],
        [*_LORA, *_ON_RANKS, "--train-backend", "megatron"],
        [*_ON_RANKS, "--context-parallel-size", "2", "--use-routing-replay"],
    ],
)
def test_what_the_ranks_can_not_do_is_refused(flags: list[str]) -> None:
    config = resolve([], flags).config
    told = list(placement_rules(config))
    assert len(told) == 1 and "use --" in told[0]


def test_adapters_are_trained_in_one_process() -> None:
    assert not list(placement_rules(resolve([], _LORA).config))
