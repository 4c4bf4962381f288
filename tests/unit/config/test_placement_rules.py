"""Who lives where: what can't be, and what has no effect."""

import pytest

from dovetail.config.check import check
from dovetail.config.notes import notes
from dovetail.config.resolve import resolve
from dovetail.types.errors import ConfigError


def test_sizes_of_a_cluster_are_told_to_do_nothing_in_one_process() -> None:
    resolved = resolve([], ["--actor-num-gpus-per-node", "8", "--tensor-model-parallel-size", "2"])
    (note,) = [one for one in notes(resolved.config) if "mode local" in one]
    assert note.endswith(": --actor-num-gpus-per-node, --tensor-model-parallel-size")
    assert resolved.config.runtime.trainer_ranks == 8


def test_the_backend_of_miles_and_cosmos_rl_is_torch() -> None:
    assert resolve([], ["--train-backend", "fsdp"]).config.trainer.train_backend == "torch"


@pytest.mark.parametrize("flags", [["--lora-rank", "4"]])
def test_what_is_not_there_is_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"this version"):
        check(resolve([], flags).config)
