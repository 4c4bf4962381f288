"""Generation during training: what can't be, what has no effect, and what it brings along."""

import pytest

from dovetail.config.async_rules import async_rules
from dovetail.config.check import check
from dovetail.config.notes import notes
from dovetail.config.resolve import resolve
from dovetail.hooks.args_view import ArgsView
from dovetail.types.errors import ConfigError

LAG = ["--max-lag", "1"]
APART = ["--mode", "disaggregated"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*LAG, "--loss-type", "sft_loss"], r"generates nothing; --max-lag 0"),
        ([*LAG, "--colocate"], r"take turns on the same devices.*--mode disaggregated"),
        (
            [*LAG, *APART, "--offload-train"],
            r"lets one of them rest; --no-offload-train.*--max-lag 0",
        ),
        ([*LAG, *APART, "--offload-rollout"], r"and offload_rollout lets.*--no-offload-rollout"),
        ([*LAG, "--update-weights-interval", "3"], r"2 steps old.*--max-lag 2"),
        (["--update-weights-interval", "2"], r"1 steps old, max_lag allows 0"),
        (["--custom-async-data-buffer-path", "a.b"], r"never called.*--max-lag 1"),
    ],
)
def test_ways_of_generating_ahead_that_can_not_be(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(resolve([], flags).config)


@pytest.mark.parametrize("leaf", ["offload-train", "offload-rollout"])
def test_a_side_that_rests_is_refused_with_a_lag_alone_and_only_where_it_would_rest(
    leaf: str,
) -> None:
    for flags in ([*LAG, f"--{leaf}"], [*APART, f"--{leaf}"], [*LAG, *APART, f"--no-{leaf}"]):
        assert list(async_rules(resolve([], flags).config)) == []


def test_the_names_of_miles_are_ours() -> None:
    rollout = resolve(
        [],
        [
            *("--max-weight-staleness", "3", "--update-weights-interval", "2"),
            *("--async-max-concurrent-samples", "64", "--async-unused-samples-handler", "drop"),
            *("--async-data-buffer-capacity-factor", "1.5"),
        ],
    ).config.rollout
    assert (rollout.max_lag, rollout.update_weights_interval) == (3, 2)
    assert rollout.async_max_concurrent_samples == 64
    assert rollout.async_unused_samples_handler == "drop"
    assert rollout.async_data_buffer_capacity_factor == 1.5


def test_a_function_of_miles_reads_no_bound_where_none_is_asked_for() -> None:
    assert ArgsView(resolve([], []).config).max_weight_staleness is None
    assert ArgsView(resolve([], LAG).config).max_weight_staleness == 1


def test_tokens_of_older_weights_are_corrected_for_unless_the_user_chose() -> None:
    resolved = resolve([], LAG)
    assert resolved.config.algorithm.use_tis
    assert resolved.origins["use_tis"] == "implied by max_lag"
    assert any("use_tis is on" in note and "--no-use-tis" in note for note in resolved.notes)
    for chosen in (["--no-use-tis"], ["--use-rollout-logprobs"], ["--use-decoupled-loss"]):
        assert not resolve([], [*LAG, *chosen]).config.algorithm.use_tis
    for other in ([], [*LAG, "--loss-type", "distillation_loss"], [*LAG, "--debug-rollout-only"]):
        assert not resolve([], other).config.algorithm.use_tis


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--async-max-concurrent-samples", "4"], "does nothing without --max-lag 1"),
        ([*LAG, "--debug-rollout-only"], "this run does not sample and train"),
        ([*LAG, "--partial-rollout"], "partial_rollout does nothing more"),
        (LAG, "a copy of the weights"),
    ],
)
def test_what_has_no_effect_is_told(flags: list[str], message: str) -> None:
    assert any(message in note for note in notes(resolve([], flags).config))
