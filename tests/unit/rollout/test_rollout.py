"""The default rollout function with hand-written engine, source and scorer."""

import asyncio
import time

import pytest

from dovetail.config.sections import RolloutConfig
from dovetail.rollout.rollout import Rollout
from dovetail.rollout.sampling import mix_seed
from dovetail.types import DynamicFilterOutput, EngineError, HookRunError, RolloutError, Sample
from tests.unit.rollout.fakes import FakeEngine, FakeScorer, FakeSource, FakeTokenizer

Status = Sample.Status
KNOBS = (
    "group_rm",
    "on_progress",
    "resolve_generate",
    "sample_hook",
    "sample_filter",
    "all_samples",
)


def make(engine=None, source=None, scorer=None, generate=None, group_filter=None, **config):
    knobs = {key: config.pop(key) for key in KNOBS if key in config}
    config = {"rollout_batch_size": 3, "n_samples_per_prompt": 2, "abort_grace_s": 0.05} | config
    return Rollout(
        engine or FakeEngine(),
        FakeTokenizer(),
        source or FakeSource(),
        scorer or FakeScorer(),
        RolloutConfig(**config),
        seed=7,
        generate=generate,
        group_filter=group_filter,
        **knobs,
    )


def collect(rollout, rollout_id=0):
    return asyncio.run(rollout(rollout_id))


def ids(output):
    return [group[0].group_index for group in output.samples]


def slow_from(group_index, engine_length=4):
    """Engine lengths: groups of two; those from `group_index` on never stop by themselves."""
    endless = {mix_seed(7, index) for index in range(2 * group_index, 200)}
    return FakeEngine(length=lambda seed: 10**6 if seed in endless else engine_length)


def drop_even(group):
    even = group[0].group_index % 2 == 0
    return DynamicFilterOutput(keep=not even, reason="even" if even else None)


def test_a_step_is_filled_scored_and_sorted():
    progress = []
    rollout = make(on_progress=lambda *event: progress.append(event))
    output = collect(rollout)
    assert ids(output) == [0, 1, 2]
    assert all(s.status is Status.COMPLETED for group in output.samples for s in group)
    assert output.metrics["rollout/reward"] == 0.5 and output.metrics["rollout/reward_std"] == 0.5
    assert output.metrics["rollout/response_length"] == 4.0
    assert output.metrics["rollout/generated_tokens"] == 24.0
    assert progress[-1] == (3, 3, 24) and [event[0] for event in progress] == [1, 2, 3]


def test_the_same_run_gives_the_same_tokens_and_order():
    def run_once():
        engine = FakeEngine(length=lambda seed: seed % 17 + 1)
        rollout = make(engine, over_sampling_batch_size=5, group_filter=drop_even)
        output = collect(rollout)
        return [(s.index, s.tokens, s.reward) for group in output.samples for s in group]

    assert run_once() == run_once()


def test_dropped_groups_are_replaced_and_counted_by_reason():
    source = FakeSource()
    output = collect(make(source=source, group_filter=drop_even))
    assert all(group[0].group_index % 2 for group in output.samples) and len(output.samples) == 3
    dropped = output.metrics["rollout/dynamic_filter/drop_even"]
    assert dropped == output.metrics["rollout/dropped_groups"]
    leftover = output.metrics["rollout/discarded_groups"]
    assert output.metrics["rollout/issued_groups"] == 3 + dropped + leftover


def test_a_filter_may_be_async_and_may_return_any_truth():
    async def keep(group):
        return 1

    assert ids(collect(make(group_filter=keep))) == [0, 1, 2]


def test_a_filter_that_drops_everything_ends_the_run():
    rollout = make(group_filter=lambda group: False, max_dropped_groups=7)
    with pytest.raises(RolloutError, match="7 groups in a row were dropped"):
        collect(rollout)


def test_surplus_without_partial_rollout_is_aborted_and_discarded():
    engine, source = slow_from(3), FakeSource()
    output = collect(
        make(engine, source, over_sampling_batch_size=5, rollout_max_response_len=10**6)
    )
    assert ids(output) == [0, 1, 2] and engine.aborts == 1
    assert output.metrics["rollout/discarded_groups"] == 2.0 and source.buffer == []


def test_surplus_under_partial_rollout_goes_back_and_is_finished_next_step():
    engine, source = slow_from(3), FakeSource()
    rollout = make(
        engine,
        source,
        over_sampling_batch_size=5,
        partial_rollout=True,
        rollout_max_response_len=10**6,
    )
    first = collect(rollout, 0)
    assert first.metrics["rollout/put_back_groups"] == 2.0
    assert [group[0].group_index for group in source.buffer] == [3, 4]
    old = {s.index: list(s.tokens) for group in source.buffer for s in group}
    for group in source.buffer:
        assert all(s.status is Status.ABORTED and s.reward is None for s in group)
        assert all(s.metadata["start_rollout_id"] == 0 for s in group)
    engine.length, engine.version = lambda seed: 20, 2
    second = collect(rollout, 1)
    assert ids(second) == [3, 4, 5]
    resumed = [s for group in second.samples[:2] for s in group]
    assert all(s.tokens[: len(old[s.index])] == old[s.index] for s in resumed)
    assert all(s.weight_versions == ["1", "2"] and s.response_length == 20 for s in resumed)
    assert second.metrics["rollout/resumed_samples"] == 4.0
    surplus = sum(s.response_length for group in source.buffer for s in group)
    already = sum(len(tokens) - 2 for tokens in old.values())
    assert second.metrics["rollout/generated_tokens"] == 120 - already + surplus


def test_a_group_that_finished_too_late_goes_back_with_its_reward():
    source, scorer = FakeSource(), FakeScorer()
    rollout = make(source=source, scorer=scorer, over_sampling_batch_size=4, partial_rollout=True)
    collect(rollout, 0)
    (late,) = source.buffer
    assert [s.status for s in late] == [Status.COMPLETED] * 2
    assert [s.reward for s in late] == [0.0, 1.0]
    before = list(scorer.scored)
    assert 3 in ids(collect(rollout, 1))
    assert not set(scorer.scored[len(before) :]) & {s.index for s in late}


def test_a_judge_that_never_answers_is_cut_off_after_the_grace_time():
    class Stuck(FakeScorer):
        async def score(self, sample):
            if sample.group_index >= 3:
                await asyncio.Event().wait()
            await super().score(sample)

    source = FakeSource()
    output = collect(
        make(source=source, scorer=Stuck(), over_sampling_batch_size=5, partial_rollout=True)
    )
    assert ids(output) == [0, 1, 2] and len(source.buffer) == 2
    for sample in (s for group in source.buffer for s in group):
        assert sample.status is Status.COMPLETED and sample.reward is None
        assert sample.response_length == 4


def test_a_tool_that_never_answers_is_cut_off_and_its_sample_starts_again():
    async def generate(call):
        if call.sample.group_index >= 3:
            call.sample.append_response_tokens(tokens=[1], log_probs=[-1.0])
            await asyncio.Event().wait()
        return await call.default(call.sample, call.sampling)

    source = FakeSource()
    output = collect(
        make(source=source, generate=generate, over_sampling_batch_size=4, partial_rollout=True)
    )
    assert ids(output) == [0, 1, 2]
    (late,) = source.buffer
    assert [(s.response_length, s.status) for s in late] == [(0, Status.ABORTED)] * 2


def test_a_generate_function_sees_the_abort():
    seen = []

    async def generate(call):
        if call.sample.group_index < 3:
            return await call.default(call.sample, call.sampling)
        while not call.aborted:
            await asyncio.sleep(0)
        seen.append(call.sample.index)
        call.sample.status = Status.ABORTED
        return call.sample

    source = FakeSource()
    collect(
        make(source=source, generate=generate, over_sampling_batch_size=4, partial_rollout=True)
    )
    assert sorted(seen) == [6, 7] and len(source.buffer) == 1


def test_group_rewards_see_whole_groups_once():
    scorer = FakeScorer()
    collect(make(scorer=scorer, group_rm=True))
    assert sorted(scorer.groups) == [[0, 1], [2, 3], [4, 5]] and scorer.scored == []


def test_a_group_whose_generation_raises_is_left_out_and_counted_by_name():
    async def generate(call):
        if call.sample.index == 3:
            raise KeyError("tool")
        return await call.default(call.sample, call.sampling)

    output = collect(make(generate=generate))
    assert 1 not in ids(output) and len(output.samples) == 3
    assert output.metrics["rollout/failed/KeyError"] == 1.0


def test_a_generate_function_that_always_raises_ends_the_run():
    async def generate(call):
        raise ValueError("broken")

    with pytest.raises(RolloutError, match=r"4 groups in a row failed .ValueError: 4.*broken"):
        collect(make(generate=generate, max_failed_groups=4))


def test_a_generate_function_that_returns_nothing_ends_the_run_at_once():
    async def generate(call):
        return None

    with pytest.raises(HookRunError, match="gave back NoneType"):
        collect(make(generate=generate))


def test_a_generate_function_may_fan_out():
    async def generate(call):
        twin = Sample(tokens=list(call.sample.tokens), prompt=call.sample.prompt)
        return [
            await call.default(call.sample, call.sampling),
            await call.default(twin, call.sampling),
        ]

    output = collect(make(generate=generate))
    assert [len(group) for group in output.samples] == [4, 4, 4]
    assert [s.rollout_id for s in output.samples[0]] == [0, 0, 1, 1]
    assert {s.group_index for s in output.samples[2]} == {2}


def test_a_group_that_its_function_aborts_is_dropped():
    async def generate(call):
        sample = await call.default(call.sample, call.sampling)
        sample.status = Status.ABORTED if sample.group_index == 0 else sample.status
        return sample

    output = collect(make(generate=generate))
    assert ids(output) == [1, 2, 3] or 0 not in ids(output)
    assert output.metrics["rollout/dynamic_filter/drop_aborted"] == 1.0


def test_engine_errors_travel_and_nothing_is_left_running():
    class Broken(FakeEngine):
        async def generate(self, request):
            if len(self.requests) == 3:
                raise EngineError("device lost")
            return await super().generate(request)

    async def scene():
        engine = Broken()
        with pytest.raises(EngineError, match="device lost"):
            await make(engine)(0)
        assert engine.aborts == 1
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert asyncio.run(scene()) == []


def test_a_cancelled_step_leaves_nothing_running():
    async def scene():
        engine = FakeEngine(length=lambda seed: 10**6)
        task = asyncio.create_task(make(engine, rollout_max_response_len=10**6)(0))
        for _ in range(10):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert asyncio.run(scene()) == []


def test_an_empty_source_is_an_error_and_a_short_one_is_asked_again():
    with pytest.raises(RolloutError, match=r"the data source gave no prompts.*2 of 3"):
        collect(make(source=FakeSource(num_groups=2)))


def test_dict_rewards_need_a_key():
    rollout = make(scorer=FakeScorer(rule=lambda sample: {"acc": 1.0}))
    with pytest.raises(RolloutError, match=r"keys \['acc'\].*--reward-key"):
        collect(rollout)
    rollout.reward_key = "acc"
    assert collect(rollout).metrics["rollout/reward"] == 1.0


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_over_a_long_run_no_prompt_is_lost_and_none_served_twice(partial, seed):
    source = FakeSource()
    engine = FakeEngine(length=lambda s: (s ^ seed) % 23 + 1)
    rollout = make(
        engine,
        source,
        over_sampling_batch_size=4,
        partial_rollout=partial,
        rollout_max_response_len=16,
        group_filter=lambda group: (group[0].group_index + seed) % 3 != 0,
    )
    outputs = [collect(rollout, i) for i in range(8)]
    kept = [index for output in outputs for index in ids(output)]
    total = {
        name: sum(output.metrics[f"rollout/{name}_groups"] for output in outputs)
        for name in ("issued", "dropped", "put_back", "discarded")
    }
    assert len(kept) == len(set(kept)) == 24
    assert total["issued"] == 24 + total["dropped"] + total["put_back"] + total["discarded"]
    fresh = total["issued"] - (total["put_back"] - len(source.buffer))
    assert fresh == source.next_group
    assert (total["discarded"] == 0) if partial else (total["put_back"] == 0)


class Users:
    """The user's functions of a rollout, which note what they are called with, in order."""

    def __init__(self, status=None):
        self.calls, self.status = [], status

    async def generate(self, call):
        sample = await call.default(call.sample, call.sampling)
        self.calls.append(("generate", sample.index))
        sample.status = self.status or sample.status
        return sample

    async def sample_hook(self, sample, rollout_id, evaluation):
        self.calls.append(("hook", sample.index, rollout_id, evaluation, sample.reward))
        sample.metadata["seen"] = True

    async def sample_filter(self, groups):
        self.calls.append(("filter", [group[0].group_index for group in groups]))
        groups[0][0].remove_sample = True

    async def all_samples(self, groups, source):
        self.calls.append(("all", [group[0].group_index for group in groups], source))


def test_functions_are_called_in_order_each_with_what_is_there_then():
    users, source = Users(), FakeSource()
    output = collect(
        make(
            source=source,
            generate=users.generate,
            sample_hook=users.sample_hook,
            sample_filter=users.sample_filter,
            all_samples=users.all_samples,
            group_filter=drop_even,
        ),
        rollout_id=5,
    )
    seen = [call[1] for call in users.calls if call[0] == "hook"]
    assert len(seen) == len(set(seen)) >= 2 * 5
    for call in users.calls:
        if call[0] == "hook":
            assert call[2:] == (5, False, None)
    for group in output.samples:
        assert all(s.metadata["seen"] and s.reward is not None for s in group)
    (kept,) = [call[1] for call in users.calls if call[0] == "filter"]
    *_, (name, every, given) = users.calls
    assert name == "all" and given is source and kept == ids(output) == sorted(kept)
    assert set(kept) < set(every) and every == sorted(every)
    assert {number for number in every if number % 2 == 0} == set(every) - set(kept)
    assert output.metrics["rollout/removed_samples"] == 1.0


def test_aborted_samples_meet_the_sample_hook_and_are_no_finished_group():
    users = Users()

    async def generate(call):
        sample = await call.default(call.sample, call.sampling)
        sample.status = Status.ABORTED if sample.group_index == 0 else sample.status
        return sample

    collect(make(generate=generate, sample_hook=users.sample_hook, all_samples=users.all_samples))
    assert {0, 1} <= {call[1] for call in users.calls if call[0] == "hook"}
    assert 0 not in users.calls[-1][1]


def test_a_sample_hook_may_put_another_sample_in_its_place():
    async def swap(sample, rollout_id, evaluation):
        twin = Sample(tokens=list(sample.tokens), response_length=sample.response_length)
        twin.status = Status.TRUNCATED
        return twin

    output = collect(make(sample_hook=swap))
    assert [s.index for group in output.samples for s in group] == [0, 1, 2, 3, 4, 5]
    assert all(s.status is Status.TRUNCATED for group in output.samples for s in group)
    assert all(s.reward is not None for group in output.samples for s in group)


def test_a_samples_own_generate_function_goes_before_the_runs():
    made = []

    def resolve(path):
        async def own(call):
            made.append((path, call.sample.index))
            return await call.default(call.sample, call.sampling)

        return own

    class Marked(FakeSource):
        def get_samples(self, num_samples):
            groups = super().get_samples(num_samples)
            groups[0][1].generate_function_path = "own.fn"
            return groups

    users = Users()
    collect(make(source=Marked(), generate=users.generate, resolve_generate=resolve))
    assert made == [("own.fn", 1)]
    assert sorted(call[1] for call in users.calls) == [0, 2, 3, 4, 5]


def test_a_function_that_clears_ids_loses_no_sample_its_place():
    async def generate(call):
        sample = await call.default(call.sample, call.sampling)
        sample.group_index = sample.index = None
        return sample if call.sample.prompt != "1?" else [sample, Sample(tokens=[1, 2])]

    output = collect(make(generate=generate))
    assert ids(output) == [0, 1, 2]
    assert [s.index for s in output.samples[1]] == [2, 2, 3, 3]
    assert {s.group_index for s in output.samples[1]} == {1}


def test_groups_without_ids_get_their_own():
    class Bare(FakeSource):
        def _fresh(self, number):
            group = super()._fresh(number)
            for sample in group:
                sample.group_index = sample.index = None
            return group

        def get_samples(self, num_samples):
            groups, self.buffer = [self._fresh(i) for i in range(num_samples)], []
            return groups

    first, second = (collect(make(source=Bare()), rollout_id=i) for i in (0, 1))
    flat = [s for output in (first, second) for group in output.samples for s in group]
    assert len({s.index for s in flat}) == 12 and len({s.group_index for s in flat}) == 6
    assert len({tuple(s.tokens[2:]) for s in flat}) == 12


def test_an_abort_without_partial_rollout_waits_for_nobody():
    async def generate(call):
        if call.sample.group_index >= 3:
            await asyncio.Event().wait()
        return await call.default(call.sample, call.sampling)

    rollout = make(generate=generate, over_sampling_batch_size=5, abort_grace_s=600)
    started = time.monotonic()
    assert ids(collect(rollout)) == [0, 1, 2]
    assert time.monotonic() - started < 5
