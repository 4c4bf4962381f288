"""What custom losses of the families import: numbers by hand, and the forms of their calls."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dovetail.types import ConfigError

pytestmark = pytest.mark.usefixtures("aliases_on")


def _module(name: str) -> Any:
    return importlib.import_module(name)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    "name",
    [
        "slime.utils.ppo_utils",
        "vime.utils.ppo_utils",
        "miles.utils.ppo_utils",
        "miles.backends.training_utils.loss_hub.math_utils",
    ],
)
def test_ppo_functions_are_one_module_under_every_address(name: str) -> None:
    assert _module(name) is _module("dovetail.compat.modules.ppo")
    assert _module(name).compute_policy_loss is not None


def _packed() -> tuple[torch.Tensor, dict[str, Any]]:
    # Two sequences, of 3 and of 2 tokens, with responses of 2 and of 1; vocabulary of 2.
    rows = [[0.0, math.log(3.0)], [0.0, 0.0], [9.0, 9.0], [math.log(4.0), 0.0], [9.0, 9.0]]
    given = {
        "args": SimpleNamespace(rollout_temperature=1.0),
        "unconcat_tokens": [torch.tensor([0, 1, 0]), torch.tensor([1, 1])],
        "total_lengths": [3, 2],
        "response_lengths": [2, 1],
    }
    return torch.tensor([rows]), given


@pytest.mark.parametrize("family", ["slime", "vime"])
@pytest.mark.parametrize("place", ["megatron_utils", "training_utils"])
def test_logprobs_of_packed_logits_are_those_of_each_response(family: str, place: str) -> None:
    logits, given = _packed()
    module = _module(f"{family}.backends.{place}.loss")
    empty, found = module.get_log_probs_and_entropy(logits, with_entropy=True, **given)
    assert empty.numel() == 0
    torch.testing.assert_close(found["log_probs"][0], t(math.log(0.75), math.log(0.5)))
    torch.testing.assert_close(found["log_probs"][1], t(math.log(0.2)))
    torch.testing.assert_close(found["entropy"][0][1], torch.tensor(math.log(2.0)))


def test_miles_gives_the_dict_alone() -> None:
    logits, given = _packed()
    for name in ("loss", "loss_hub.logit_processors", "loss_hub.logits", "loss_hub.losses"):
        module = _module(f"miles.backends.training_utils.{name}")
        found = module.get_log_probs_and_entropy(logits, **given)
        torch.testing.assert_close(found["log_probs"][1], t(math.log(0.2)))


@pytest.mark.parametrize(
    "name",
    ["slime.backends.megatron_utils.loss", "miles.backends.training_utils.loss_hub.corrections"],
)
def test_stock_corrections_are_called_by_keyword(name: str) -> None:
    given = {
        "args": SimpleNamespace(tis_clip=2.0, tis_clip_low=0.5, use_tis=True),
        "pg_loss": t(1.0, 1.0, 1.0),
        # Ratios 4, 1 and 0.25.
        "train_log_probs": [t(math.log(4.0), 0.0), t(-math.log(4.0))],
        "rollout_log_probs": [t(0.0, 0.0), t(0.0)],
        "loss_masks": [t(1.0, 1.0), t(1.0)],
        "total_lengths": [4, 2],
        "response_lengths": [2, 1],
    }
    loss, masks, metrics = _module(name).vanilla_tis_function(**given)
    torch.testing.assert_close(loss, t(2.0, 1.0, 0.5))
    assert [mask.tolist() for mask in masks] == [[1.0, 1.0], [1.0]]
    torch.testing.assert_close(metrics["tis"], t(4.0, 1.0, 0.25))
    state = {"parallel_state": None, "max_seq_lens": None}
    loss, _, _ = _module(name).icepop_function(**given, **state)
    torch.testing.assert_close(loss, t(0.0, 1.0, 0.0))


def test_context_parallelism_of_one_rank_changes_nothing() -> None:
    cp = _module("slime.backends.megatron_utils.cp_utils")
    assert cp is _module("miles.backends.training_utils.cp_utils")
    values = t(1.0, 2.0)
    assert cp.all_gather_with_cp(values, 5, 2) is values
    assert cp.slice_log_prob_with_cp([0.5, 1.0], 5, 2, "thd", 9) == [0.5, 1.0]
    assert cp.slice_with_cp(values, 0) is values
    # 7 tokens, 4 of them response: chunks of 4; logits 2..5 predict tokens 3..6.
    assert cp.get_logits_and_tokens_offset_with_cp(7, 4) == (
        4,
        ((0, 4), (4, 8)),
        ((2, 4), (4, 6)),
        ((3, 5), (5, 7)),
    )
    assert cp.get_logits_and_tokens_offset_with_cp(6, 2)[2] == ((0, 0), (3, 5))
    with pytest.raises(ValueError, match="2 tokens"):
        cp.all_gather_with_cp(t(1.0), 5, 2)
    with pytest.raises(ConfigError, match="--context-parallel-size"):
        cp.all_gather_with_cp(values, 5, 2, SimpleNamespace(cp_size=2))


def test_the_sum_of_sample_means_takes_the_older_call_form_too() -> None:
    cp = _module("vime.backends.megatron_utils.cp_utils")
    masks = [t(1.0, 1.0), t(1.0)]
    values = t(1.0, 3.0, 5.0)
    assert float(cp.get_sum_of_sample_mean([4, 2], [2, 1], masks)(values)) == 2.0 + 5.0
    assert float(cp.get_sum_of_sample_mean([4, 2], [2, 1], masks, True)(values)) == 9.0
