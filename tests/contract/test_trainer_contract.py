"""Every training backend, on any number of ranks, makes the steps that one process makes."""

import pytest
import torch

from tests.contract.ranks import on_ranks
from tests.contract.trained import CASES, trained

APART = 1e-4
ROWS = {"2 ranks, replicated": (2, "replicated")}


@pytest.fixture(scope="module")
def alone():
    found = {}
    return lambda case: (
        found.setdefault(case, None) or found.update({case: trained(0, 1, case)}) or found[case]
    )


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES)
def test_it_makes_the_steps_of_one_process(row, case, alone):
    world, kind = ROWS[row]
    expected = alone(case)
    ranks = on_ranks(world, "tests.contract.trained:trained", case=case, kind=kind)
    for rank in ranks:
        for got, want in zip(rank["metrics"], expected["metrics"], strict=True):
            assert got.keys() == want.keys()
            for name in want:
                if name != "train/model_tokens":
                    assert got[name] == pytest.approx(want[name], rel=APART, abs=1e-6), name
    for name, values in expected["weights"].items():
        got = torch.tensor(ranks[0]["weights"][name])
        torch.testing.assert_close(got, torch.tensor(values), rtol=0, atol=APART)
