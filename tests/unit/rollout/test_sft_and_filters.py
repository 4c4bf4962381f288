"""The engine-less rollout function, and the filters by name."""

import asyncio
from types import SimpleNamespace

import pytest

from dovetail.rollout.filters import (
    check_no_aborted,
    check_reward_nonzero_std,
    check_reward_nonzero_std_with_fallback,
)
from dovetail.rollout.sft import SftRollout
from dovetail.types import DataError, RolloutError, Sample
from tests.unit.rollout.fakes import FakeSource

ARGS = SimpleNamespace(reward_key=None)


class Supervised(FakeSource):
    def _fresh(self, number):
        group = super()._fresh(number)
        for sample in group:
            sample.append_response_tokens(
                tokens=[65] * (number + 1), log_probs=[0.0] * (number + 1)
            )
        return group


def test_supervised_samples_come_completed_and_in_order():
    output = asyncio.run(SftRollout(Supervised(1), 3)(0))
    samples = [s for group in output.samples for s in group]
    assert [s.index for s in samples] == [0, 1, 2]
    assert {(s.status, s.reward) for s in samples} == {(Sample.Status.COMPLETED, 0.0)}
    assert output.metrics["rollout/response_length"] == 2.0
    assert output.metrics["rollout/tokens"] == 6.0


def test_supervised_samples_without_a_response_are_refused():
    with pytest.raises(DataError, match=r"sample 0 has no response to learn from.*--label-key"):
        asyncio.run(SftRollout(FakeSource(1), 2)(0))


def test_an_empty_supervised_source_is_an_error():
    with pytest.raises(RolloutError, match="gave no samples"):
        asyncio.run(SftRollout(FakeSource(1, num_groups=0), 2)(0))


def test_groups_of_equal_rewards_are_dropped_with_the_reward_as_reason():
    equal = [Sample(reward=1.0), Sample(reward=1.0 + 1e-9)]
    output = check_reward_nonzero_std(ARGS, equal)
    assert (output.keep, output.reason, output.keep_when_insufficient) == (
        False,
        "zero_std_1.0",
        False,
    )
    assert check_reward_nonzero_std(ARGS, [Sample(reward=1.0), Sample(reward=0)]).keep
    assert check_reward_nonzero_std_with_fallback(ARGS, equal).keep_when_insufficient


def test_filters_read_dict_rewards_by_reward_key():
    group = [Sample(reward={"a": 1.0, "b": 0.0}), Sample(reward={"a": 0.0, "b": 0.0})]
    assert check_reward_nonzero_std(SimpleNamespace(reward_key="a"), group).keep
    assert not check_reward_nonzero_std(SimpleNamespace(reward_key="b"), group).keep


def test_groups_with_an_aborted_sample_are_dropped():
    group = [Sample(status=Sample.Status.COMPLETED), Sample(status="aborted")]
    assert check_no_aborted(ARGS, group).reason == "aborted"
    assert check_no_aborted(ARGS, group[:1]).keep
