import argparse
import asyncio

import pytest

from dovetail.config.run import RunConfig
from dovetail.config.sections import RewardConfig
from dovetail.hooks import ArgsView, bind
from dovetail.rewards.score import Scorer
from dovetail.types.errors import ConfigError, HookRunError, RewardError
from dovetail.types.ports import Scorer as ScorerPort
from dovetail.types.sample import Sample


def sample(index=0, **fields):
    return Sample(index=index, prompt="p", response="r", label="l", **fields)


def score(custom, *, one=None, **settings):
    """The sample after scoring, and the scorer's metrics."""
    scorer = Scorer(RewardConfig(**settings), custom)
    one = one or sample()
    asyncio.run(scorer.score(one))
    return one, scorer.metrics()


async def hang(_):
    await asyncio.Event().wait()


async def hang_and_swallow_the_cancellation(_):
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await asyncio.Event().wait()


async def cancel_itself(_):
    raise asyncio.CancelledError


async def leave(_):
    raise SystemExit(3)


def leave_at_once(_):
    raise SystemExit(3)


def divide(_):
    return 1 / 0


def test_a_scorer_fits_its_port():
    assert isinstance(Scorer(RewardConfig()), ScorerPort)


def test_plain_and_async_functions_set_the_reward():
    async def later(one):
        await asyncio.sleep(0)
        return len(one.response)

    one, metrics = score(lambda one: 0.5)
    assert (one.reward, one.remove_sample, metrics) == (0.5, False, {"reward/scored": 1.0})
    assert score(later)[0].reward == 1.0


def bound(custom):
    """As a run has it: with a time limit of its own."""
    hook = bind("custom_rm", custom, ArgsView(RunConfig(), reward_timeout_s=0.05))
    assert hook.has_time_limit
    return hook


@pytest.mark.parametrize("way", [lambda custom: custom, bound])
@pytest.mark.parametrize(
    ("custom", "kind"),
    [
        (divide, "ZeroDivisionError"),
        (hang, "timeout"),
        (hang_and_swallow_the_cancellation, "timeout"),
        (cancel_itself, "CancelledError"),
        (leave, "SystemExit"),
        (leave_at_once, "SystemExit"),
        (lambda _: None, "none"),
        (lambda _: float("nan"), "nan"),
        (lambda _: float("inf"), "inf"),
        (lambda _: "1", "wrong_type"),
        (lambda _: [1.0], "wrong_type"),
        (lambda _: {"score": 1.0}, "unexpected_object"),
    ],
)
def test_a_failed_reward_excludes_the_sample_and_is_counted_by_name(way, custom, kind):
    one, metrics = score(way(custom), reward_timeout_s=0.05)
    assert one.reward == 0.0 and one.remove_sample
    assert one.metadata["reward_error"].startswith(kind)
    assert metrics == {"reward/failed": 1.0, f"reward/failures/{kind}": 1.0}


def test_a_failed_sample_of_object_rewards_has_zero_under_every_key():
    one, _ = score(divide, reward_key="score", eval_reward_key="acc")
    assert one.reward == {"score": 0.0, "acc": 0.0}
    one, _ = score(lambda _: {"score": 1, "why": "x"}, reward_key="score")
    assert one.reward == {"score": 1.0, "why": "x"}


def test_failures_in_a_row_stop_the_run_with_the_name_and_the_last_fault():
    scorer = Scorer(RewardConfig(max_reward_failures=3), divide, name="mine.py:divide")

    async def four():
        for index in range(4):
            await scorer.score(sample(index))

    with pytest.raises(RewardError, match=r"mine\.py:divide failed 3 times .* sample 2") as caught:
        asyncio.run(four())
    assert "ZeroDivisionError: division by zero" in str(caught.value)
    assert "--max-reward-failures" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_success_in_between_starts_the_count_again():
    def every_third(one):
        return 1.0 if one.index % 3 == 2 else None

    scorer = Scorer(RewardConfig(max_reward_failures=3), every_third)

    async def many():
        for index in range(30):
            await scorer.score(sample(index))

    asyncio.run(many())
    assert scorer.metrics() == {
        "reward/scored": 10.0,
        "reward/failed": 20.0,
        "reward/failures/none": 20.0,
    }
    assert scorer.metrics() == {}


def test_a_later_success_takes_the_old_fault_back():
    one = sample(metadata={"reward_error": "timeout"})
    score(lambda _: 1.0, one=one)
    assert one.metadata == {}


def test_a_sample_that_has_a_reward_keeps_it():
    one, metrics = score(divide, one=sample(reward=0.25))
    assert one.reward == 0.25 and metrics == {}


@pytest.mark.parametrize(
    ("given", "kind"),
    [(float("nan"), "nan"), (float("-inf"), "inf"), ("high", "wrong_type"), ([1.0], "wrong_type")],
)
def test_a_reward_that_a_generate_function_set_and_that_is_none_fails(given, kind):
    one, metrics = score(None, one=sample(reward=given))
    assert one.reward == 0.0 and one.remove_sample
    assert metrics == {"reward/failed": 1.0, f"reward/failures/{kind}": 1.0}
    one, metrics = score(None, one=sample(reward={"own": "form"}))
    assert one.reward == {"own": "form"} and metrics == {}


class Odd:
    """A number that is none."""

    def __float__(self):
        raise ZeroDivisionError


def test_a_value_whose_own_conversion_raises_fails_its_sample():
    one, metrics = score(lambda _: Odd())
    assert one.remove_sample and metrics["reward/failures/ZeroDivisionError"] == 1.0
    samples, metrics = group(custom=lambda s: [1.0, Odd(), 0.5])
    assert [one.remove_sample for one in samples] == [False, True, False]
    assert metrics["reward/failures/ZeroDivisionError"] == 1.0


def group(*settings, custom, size=3, **values):
    scorer = Scorer(RewardConfig(group_rm=True, **values), custom)
    samples = [sample(index) for index in range(size)]
    asyncio.run(scorer.score_group(samples))
    return samples, scorer.metrics()


def test_a_group_reward_sees_the_whole_group_once():
    calls = []

    async def rank(samples):
        calls.append(len(samples))
        return [one.index / 2 for one in samples]

    samples, metrics = group(custom=rank)
    assert [one.reward for one in samples] == [0.0, 0.5, 1.0]
    assert calls == [3] and metrics == {"reward/scored": 3.0}


@pytest.mark.parametrize(
    ("custom", "kind"),
    [
        (lambda s: 1.0, "wrong_type"),
        (lambda s: None, "none"),
        (divide, "ZeroDivisionError"),
        (hang, "timeout"),
    ],
)
def test_a_failed_group_reward_excludes_the_whole_group(custom, kind):
    samples, metrics = group(custom=custom, reward_timeout_s=0.05)
    assert all(one.remove_sample and one.reward == 0.0 for one in samples)
    assert metrics == {"reward/failed": 3.0, f"reward/failures/{kind}": 3.0}


def test_a_list_of_another_length_than_the_group_ends_the_run():
    with pytest.raises(HookRunError, match=r"1 rewards for a group of 3 .* sample 0.*--group-rm"):
        group(custom=lambda samples: [1.0])


def test_what_breaks_the_contract_of_a_hook_ends_the_run():
    def broken(_):
        raise HookRunError("two rewards for three")

    for settings in ({}, {"group_rm": True}):
        scorer = Scorer(RewardConfig(**settings), broken)
        with pytest.raises(HookRunError, match="two rewards"):
            asyncio.run(scorer.score_group([sample(0), sample(1)]))


def test_a_group_function_may_set_rewards_itself_too():
    async def both(samples):
        for one in samples:
            one.reward = 9.0
        return [1.0 for _ in samples]

    samples, _ = group(custom=both)
    assert [one.reward for one in samples] == [1.0, 1.0, 1.0]


def test_under_group_rm_a_function_for_one_sample_fails_one_sample(tmp_path):
    file = tmp_path / "single.py"
    file.write_text("async def judge(args, sample):\n    return 1 / sample.index\n")
    custom = bind("custom_rm", f"{file}:judge", argparse.Namespace(group_rm=True))
    samples, metrics = group(custom=custom)
    assert [one.reward for one in samples] == [0.0, 1.0, 0.5]
    assert [one.remove_sample for one in samples] == [True, False, False]
    assert metrics["reward/failures/ZeroDivisionError"] == 1.0


def test_under_group_rm_the_samples_own_function_judges_its_part_of_the_group():
    calls = []

    def judge(value):
        def rewards(samples):
            calls.append([one.index for one in samples])
            return [value for _ in samples]

        return rewards

    scorer = Scorer(RewardConfig(group_rm=True), judge(1.0), resolve=lambda path: judge(2.0))
    samples = [sample(0), sample(1, custom_rm_path="own"), sample(2, custom_rm_path="own")]
    asyncio.run(scorer.score_group(samples))
    assert [one.reward for one in samples] == [1.0, 2.0, 2.0] and calls == [[0], [1, 2]]
    alone = sample(3, custom_rm_path="own")
    asyncio.run(scorer.score(alone))
    assert alone.reward == 2.0


def test_one_bad_entry_of_a_group_excludes_one_sample():
    samples, metrics = group(custom=lambda s: [1.0, None, 0.5])
    assert [one.reward for one in samples] == [1.0, 0.0, 0.5]
    assert [one.remove_sample for one in samples] == [False, True, False]
    assert metrics["reward/failures/none"] == 1.0


def test_the_samples_own_function_goes_first_and_is_resolved_once():
    resolved = []

    def resolve(path):
        resolved.append(path)
        return lambda one: 7.0

    scorer = Scorer(RewardConfig(rm_type="random"), lambda one: 1.0, resolve=resolve)

    async def both():
        own = [sample(i, custom_rm_path="a.py:f") for i in range(2)]
        other = sample(2)
        for one in (*own, other):
            await scorer.score(one)
        return [one.reward for one in (*own, other)]

    assert asyncio.run(both()) == [7.0, 7.0, 1.0]
    assert resolved == ["a.py:f"]


def test_the_samples_rm_type_goes_before_the_runs():
    scorer = Scorer(RewardConfig(rm_type="math"))
    one = Sample(index=0, response="it is 5", label="5")
    boxed = Sample(index=1, response="it is 5", label="5", metadata={"rm_type": "boxed_math"})
    right = Sample(index=2, response="\\boxed{5}", label="5", metadata={"rm_type": "boxed_math"})

    async def all_three():
        for each in (one, boxed, right):
            await scorer.score(each)

    asyncio.run(all_three())
    assert [one.reward, boxed.reward, right.reward] == [1.0, 0.0, 1.0]


def test_no_reward_and_an_unknown_reward_are_mistakes_of_the_run():
    with pytest.raises(ConfigError, match=r"--rm-type .* --custom-rm-path"):
        score(None)
    with pytest.raises(ConfigError, match="did you mean 'math'"):
        score(None, rm_type="maths")
    with pytest.raises(ConfigError, match="--rm-url"):
        score(None, rm_type="remote_rm")


def test_the_coin_is_fixed_by_seed_and_index():
    def coins(seed):
        scorer = Scorer(RewardConfig(rm_type="random"), seed=seed)
        samples = [sample(i) for i in range(64)]

        async def all_of_them():
            await asyncio.gather(*map(scorer.score, samples))

        asyncio.run(all_of_them())
        return [one.reward for one in samples]

    assert coins(1) == coins(1) != coins(2)
    assert set(coins(1)) == {0.0, 1.0} and 16 < sum(coins(1)) < 48


def test_at_most_so_many_async_rewards_run_at_a_time():
    running, most = 0, 0

    async def busy(_):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return 1.0

    scorer = Scorer(RewardConfig(), busy, max_concurrent=4)

    async def many():
        await asyncio.gather(*(scorer.score(sample(i)) for i in range(40)))

    asyncio.run(many())
    assert most == 4 and scorer.metrics() == {"reward/scored": 40.0}


def test_waiting_for_a_turn_is_not_timed():
    async def slow(_):
        await asyncio.sleep(0.03)
        return 1.0

    scorer = Scorer(RewardConfig(reward_timeout_s=0.3), slow, max_concurrent=1)

    async def many():
        await asyncio.gather(*(scorer.score(sample(i)) for i in range(20)))

    asyncio.run(many())
    assert scorer.metrics() == {"reward/scored": 20.0}


def test_two_hundred_hangs_are_all_cut_off():
    scorer = Scorer(RewardConfig(reward_timeout_s=0.05, max_reward_failures=1000), hang)

    async def many():
        await asyncio.gather(*(scorer.score(sample(i)) for i in range(200)))
        return len(asyncio.all_tasks())

    assert asyncio.run(many()) <= 1 + 200
    assert scorer.metrics()["reward/failures/timeout"] == 200.0


@pytest.mark.parametrize("way", [lambda custom: custom, bound])
def test_cancelling_the_scoring_cancels_the_function(way):
    cut = []

    async def watched(_):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cut.append(True)
            raise

    async def cancel():
        task = asyncio.create_task(Scorer(RewardConfig(), way(watched)).score(sample()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)

    asyncio.run(cancel())
    assert cut == [True]
