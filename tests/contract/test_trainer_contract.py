"""Every training backend, on any number of ranks, makes the steps that one process makes.

A row: who makes the trainer of one rank (see `trained`), on how many ranks, in which layout, and
the cases that it is held to (all of them by default).
"""

from dataclasses import asdict, dataclass, field

import pytest
import torch

from tests.contract.ranks import Ranks
from tests.contract.trained import CASES, Case, settings_of, trained, write_models

APART = 1e-4
HERE = "tests.contract.trained"


@dataclass(frozen=True)
class Row:
    make: str
    world: int = 2
    layout: dict = field(default_factory=dict)
    cases: tuple = tuple(CASES)
    architecture: str = "Qwen3"


TORCH = "tests.contract.torch_made:sharded"
ROWS = {
    "torch, 2 ranks FSDP2": Row(TORCH),
    "torch, tp 2": Row(TORCH, layout={"tensor_model_parallel_size": 2}),
    "torch, cp 2": Row(TORCH, layout={"context_parallel_size": 2}),
    "torch, 2 copies": Row(TORCH, layout={"dp_replicate_size": 2}, cases=("grpo",)),
    "torch, 2 ranks replicated": Row(f"{HERE}:replicated", cases=("grpo", "sequences")),
}
PAIRS = [(row, case) for row, its in ROWS.items() for case in its.cases]


@pytest.fixture(scope="module")
def pair():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of policy and reference by architecture."""
    made = {}

    def of(architecture):
        if architecture not in made:
            made[architecture] = write_models(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return of


@pytest.fixture(scope="module")
def alone(models):
    """What one process makes of a case."""
    made = {}

    def of(architecture, case):
        if (architecture, case) not in made:
            told = asdict(Case(**models(architecture), settings=settings_of(case)))
            made[architecture, case] = trained(0, 1, f"{HERE}:alone", told)
        return made[architecture, case]

    return of


@pytest.mark.parametrize(("row", "case"), PAIRS)
def test_it_makes_the_steps_of_one_process(row, case, pair, models, alone):
    row = ROWS[row]
    told = Case(**models(row.architecture), settings=settings_of(case), layout=row.layout)
    ranks = pair.call(f"{HERE}:trained", make=row.make, case=asdict(told))
    expected = alone(row.architecture, case)
    for rank in ranks:
        same_metrics(rank["metrics"], expected["metrics"])
    same_weights(ranks[0]["weights"], expected["weights"])


def same_metrics(got_steps, want_steps):
    for got, want in zip(got_steps, want_steps, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            if name != "train/model_tokens":
                assert got[name] == pytest.approx(want[name], rel=APART, abs=1e-6), name


def same_weights(got, want):
    assert got.keys() == want.keys()
    for name, values in want.items():
        torch.testing.assert_close(
            torch.tensor(got[name]), torch.tensor(values), rtol=0, atol=APART, msg=name
        )
