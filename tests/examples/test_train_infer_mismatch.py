"""Weights and rejections, worked by hand, and in a run whose engine is off by a factor of two."""

from __future__ import annotations

import math

import pytest
import torch

from dovetail.hooks import ArgsView, HookSpec, bind
from dovetail.types import CorrectionCall
from tests.examples.example_run import ROOT

PATH = f"{ROOT}/examples/train_infer_mismatch/mis.py:compute_mis_weights"
RATIOS = [[1.0, 4.0], [0.25, 0.5, 2.0]]
"""Per token. Products: 4 and 0.25; geometric means: 2 and 0.25 ** (1/3) = 0.63."""
NO_RS = {"tis_upper_bound": 2.0, "use_rs": False}


def corrected(masks=None, **settings):
    """(weighed loss of per-token losses 1, masks, metrics)."""
    train = [torch.tensor([math.log(r) - 1.0 for r in one]) for one in RATIOS]
    rollout = [torch.full((len(one),), -1.0) for one in RATIOS]
    masks = masks or [[1, 1], [1, 1, 1]]
    args = ArgsView(None, use_tis=True, **settings)
    call = CorrectionCall(
        pg_loss=torch.ones(5),
        train_log_probs=train,
        rollout_log_probs=rollout,
        loss_masks=[torch.tensor(mask) for mask in masks],
        total_lengths=[4, 5],
        response_lengths=[2, 3],
        args=args,
    )
    hook = bind("custom_tis_function", PATH, args)
    assert isinstance(hook.spec, HookSpec)
    loss, masks, metrics = hook(call)
    return loss.tolist(), [mask.tolist() for mask in masks], metrics


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"tis_mode": "truncate"}, [1, 2, 0.25, 0.5, 2]),
        ({"tis_mode": "clip"}, [1, 2, 0.5, 0.5, 2]),
        ({"tis_mode": "clip", "tis_lower_bound": 0.3}, [1, 2, 0.3, 0.5, 2]),
        ({"tis_mode": "truncate", "tis_level": "sequence"}, [2, 2, 0.25, 0.25, 0.25]),
        ({"tis_mode": "clip", "tis_level": "sequence"}, [2, 2, 0.5, 0.5, 0.5]),
        (
            {"tis_level": "geometric", "tis_upper_bound": 1.5},
            [1.5, 1.5, 0.62996, 0.62996, 0.62996],
        ),
    ],
)
def test_weights_by_mode_level_and_bounds(settings, weights):
    loss, masks, _ = corrected(**{**NO_RS, **settings})
    assert loss == pytest.approx(weights, abs=1e-4)
    assert masks == [[1, 1], [1, 1, 1]]


def test_masking_leaves_out_what_lies_outside_of_the_bounds():
    _, masks, metrics = corrected(**NO_RS, tis_mode="mask")
    assert masks == [[1, 0], [0, 1, 1]]
    assert metrics["mis_rejected"].tolist() == [0, 1, 1, 0, 0]
    _, masks, _ = corrected(**NO_RS, tis_mode="mask", tis_level="sequence")
    assert masks == [[0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rs_level": "token", "rs_upper_bound": 2.0}, [[1, 0], [0, 1, 1]]),
        ({"rs_level": "token", "rs_upper_bound": 4.0}, [[1, 1], [1, 1, 1]]),
        ({"rs_level": "sequence", "rs_upper_bound": 4.0}, [[1, 1], [1, 1, 1]]),
        ({"rs_level": "sequence", "rs_upper_bound": 3.0}, [[0, 0], [0, 0, 0]]),
        (
            {"rs_level": "sequence", "rs_upper_bound": 3.0, "rs_lower_bound": 0.2},
            [[0, 0], [1, 1, 1]],
        ),
        ({"rs_level": "geometric", "rs_upper_bound": 1.9}, [[0, 0], [1, 1, 1]]),
        ({"rs_upper_bound": 4.0, "rs_veto_threshold": 0.3}, [[1, 1], [0, 0, 0]]),
        ({"rs_upper_bound": 4.0, "rs_veto_threshold": 0.2}, [[1, 1], [1, 1, 1]]),
    ],
)
def test_rejection_by_level_bounds_and_veto(settings, expected):
    loss, masks, _ = corrected(tis_upper_bound=2.0, use_rs=True, **settings)
    assert masks == expected
    assert loss == pytest.approx([1, 2, 0.25, 0.5, 2])


def test_tokens_that_are_not_trained_on_have_no_say():
    masks = [[1, 0], [0, 1, 1]]
    # Products over the rest: 1 and 1.
    loss, _, _ = corrected(masks, **NO_RS, tis_level="sequence")
    assert loss == pytest.approx([1, 1, 1, 1, 1])
    settings = {"use_rs": True, "rs_upper_bound": 4.0, "rs_veto_threshold": 0.3}
    _, kept, _ = corrected(masks, tis_upper_bound=2.0, **settings)
    assert kept == masks


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(Exception, match="tis_mode is 'cut', expected one of truncate, clip, mask"):
        corrected(tis_mode="cut")
    with pytest.raises(Exception, match="out of order"):
        corrected(tis_lower_bound=3.0, tis_upper_bound=2.0)


HOOKS = """
import math

def reward(sample):
    return float(sample.response_length)

def off_by_two(sample):
    sample.rollout_log_probs = [one - math.log(2) for one in sample.rollout_log_probs]
"""


def test_a_run_weighs_its_loss_where_the_engine_is_off_by_two(run_example, tmp_path):
    (tmp_path / "user.py").write_text(HOOKS)
    (tmp_path / "mis.yaml").write_text("tis_mode: truncate\ntis_upper_bound: 1.5\n")
    flags = ["--num-rollout", 1, "--rollout-batch-size", 4, "--n-samples-per-prompt", 4]
    # Means over samples of centred advantages would cancel out.
    flags += ["--calculate-per-token-loss", "--custom-rm-path", f"{tmp_path / 'user.py'}:reward"]
    own = ["--custom-config-path", tmp_path / "mis.yaml"]
    (exact,) = run_example("train_infer_mismatch", *flags, *own)
    own += ["--rollout-sample-hook-path", f"{tmp_path / 'user.py'}:off_by_two"]
    (off,) = run_example("train_infer_mismatch", *flags, *own)
    assert exact["train/mis_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert exact["train/mis_changed"] == 0.0
    assert off["train/mis_ratio"] == pytest.approx(2.0, abs=1e-3)
    assert off["train/mis_changed"] == 1.0
    assert abs(exact["train/pg_loss"]) > 0.01
    assert off["train/pg_loss"] == pytest.approx(1.5 * exact["train/pg_loss"], rel=1e-3)
    # The bounds of the example's own settings leave such responses out altogether.
    (refused,) = run_example("train_infer_mismatch", *flags, *own[2:])
    assert refused["train/mis_rejected"] == 1.0
    assert refused["train/pg_loss"] == 0.0
