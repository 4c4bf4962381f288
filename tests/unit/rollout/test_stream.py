"""The rollout whose groups are made across steps: what each step gets, and what goes back."""

import asyncio
import dataclasses

import pytest

from dovetail.config.sections import RolloutConfig
from dovetail.rollout.sampling import mix_seed
from dovetail.rollout.stream import StreamRollout
from dovetail.types import HookRunError, RolloutError, Sample, VersionSpan
from tests.unit.rollout.fakes import FakeEngine, FakeScorer, FakeSource, FakeTokenizer
from tests.unit.rollout.steps import ids

Status = Sample.Status


def make(engine=None, source=None, num_steps=8, make_buffer=None, group_filter=None, **config):
    config = {
        "rollout_batch_size": 2,
        "n_samples_per_prompt": 2,
        "max_lag": 1,
        "rollout_max_response_len": 10**6,
    } | config
    stream = StreamRollout(
        engine or FakeEngine(version=0),
        FakeTokenizer(),
        source or FakeSource(),
        FakeScorer(),
        RolloutConfig(**config),
        seed=7,
        group_filter=group_filter,
        make_buffer=make_buffer,
    )
    stream.starts_at(0, num_steps)
    return stream


class Gated(FakeEngine):
    """Groups of two whose responses end when their gate is opened."""

    def __init__(self, *closed):
        super().__init__(version=0)
        self.gates = {group: asyncio.Event() for group in closed}
        self.by_seed = {mix_seed(7, 2 * group + i): group for group in closed for i in (0, 1)}

    async def generate(self, request):
        gate = self.gates.get(self.by_seed.get(request.sampling.seed))
        born = self.version
        if gate is not None:
            await gate.wait()
        result = await super().generate(request)
        spans = (VersionSpan(born, 0, len(result.token_ids)),)
        return dataclasses.replace(result, version_spans=spans)


async def turns(count=50):
    for _ in range(count):
        await asyncio.sleep(0)


async def train(stream, step):
    """What the loop does between two takes."""
    stream.trained(step)
    stream.engine.version = step + 1
    stream.published(step + 1)


def numbers(groups):
    return sorted(group[0].group_index for group in groups)


def test_groups_for_the_next_step_are_made_while_the_first_is_trained():
    async def scene():
        source = FakeSource()
        stream = make(source=source)
        stream.published(0)
        assert ids(await stream(0)) == [0, 1]
        await turns()
        assert numbers(stream.unused()) == [0, 1, 2, 3], "nothing is trained yet"
        assert stream.may_begin(1) and not stream.may_begin(2)
        second = await stream(1)
        assert ids(second) == [2, 3]
        assert second.metrics["rollout/lag_mean"] == 1.0
        assert second.metrics["rollout/lag_1_samples"] == 4.0
        await train(stream, 0)
        assert numbers(stream.unused()) == [2, 3] and stream.may_begin(2)

    asyncio.run(scene())


def test_a_step_waits_for_a_group_that_would_be_too_old_for_the_next():
    async def scene():
        engine = Gated(0)
        stream = make(engine)
        stream.published(0)
        assert ids(await stream(0)) == [1, 2]
        await train(stream, 0)
        step = asyncio.create_task(stream(1))
        await turns()
        assert not step.done(), "group 0 is of version 0 and must be in step 1"
        engine.gates[0].set()
        output = await step
        assert ids(output) == [0, 3]
        assert output.metrics["rollout/stale_groups"] == 0.0

    asyncio.run(scene())


def test_groups_that_over_sampling_leaves_too_old_go_back_from_the_beginning():
    async def scene():
        engine, source = Gated(3, 4), FakeSource()
        stream = make(engine, source, over_sampling_batch_size=5, max_lag=1)
        stream.published(0)
        await stream(0)
        await train(stream, 0)
        step = asyncio.create_task(stream(1))
        await turns()
        engine.gates[3].set()
        output = await step
        assert 3 in ids(output)
        await train(stream, 1)
        third = await stream(2)
        assert third.metrics["rollout/stale_groups"] == 1.0
        assert third.metrics["rollout/put_back_groups"] == 1.0
        again = [group for group in source.buffer if group[0].group_index == 4]
        flying = [one for one in stream.unused() if one[0].group_index == 4]
        (group,) = again or flying
        assert all(s.response_length == 0 and s.reward is None for s in group)
        await stream.close()

    asyncio.run(scene())


def test_stale_groups_are_given_up_or_kept_where_the_setting_says_so():
    async def scene(handler):
        engine = Gated(3, 4)
        stream = make(engine, over_sampling_batch_size=5, async_unused_samples_handler=handler)
        stream.published(0)
        for step in (0, 1):
            filling = asyncio.create_task(stream(step))
            await turns()
            engine.gates[3].set()
            await filling
            await train(stream, step)
        engine.gates[4].set()
        await turns()
        output = await stream(2)
        await stream.close()
        return stream, output

    stream, output = asyncio.run(scene("drop"))
    assert stream.window.dropped["stale"] == 1 and 4 not in ids(output)
    assert output.metrics["rollout/discarded_groups"] == 1.0
    stream, output = asyncio.run(scene("keep"))
    assert 4 in ids(output) and output.metrics["rollout/lag_max"] == 2.0


def test_an_engine_that_breaks_off_at_a_publish_is_asked_again_for_the_rest():
    async def scene():
        endless = {mix_seed(7, i) for i in range(4)}
        engine = FakeEngine(length=lambda seed: 30 if seed in endless else 4, version=0)
        stream = make(engine)
        stream.published(0)
        assert ids(await stream(0)) == [2, 3]
        step = asyncio.create_task(stream(1))
        stream.updating()
        await engine.abort()
        await turns(1)
        engine.version = 1
        await turns(5)
        stream.published(1)
        return await step

    output = asyncio.run(scene())
    samples = [sample for group in output.samples for sample in group]
    assert all(sample.response_length in (4, 30) for sample in samples)
    long = [sample for sample in samples if sample.response_length == 30]
    assert len(long) == 4 and all(sample.weight_versions == ["0", "1"] for sample in long)


def test_what_a_checkpoint_puts_back_is_finished_groups_whole_and_others_as_prompts():
    async def scene():
        engine = Gated(0)
        stream = make(engine)
        stream.published(0)
        await stream(0)
        await turns()
        back = {group[0].group_index: group for group in stream.unused()}
        assert sorted(back) == [0, 1, 2, 3]
        assert all(s.response_length == 0 for s in back[0])
        assert all(s.status is Status.COMPLETED and s.reward is not None for s in back[3])
        await stream.close()
        assert numbers(stream.unused()) == [0, 1, 2, 3], "also when all is cut off"

    asyncio.run(scene())


def test_what_a_resumed_run_gets_back_is_not_made_twice_and_keeps_its_age():
    async def scene():
        first = make()
        first.published(0)
        await first(0)
        await turns()
        source, engine = FakeSource(), FakeEngine(version=1)
        first.trained(0)
        source.add_samples(first.unused())
        source.next_group = 4
        resumed = make(engine, source)
        resumed.starts_at(1, 8)
        resumed.published(1)
        output = await resumed(1)
        assert ids(output) == [2, 3]
        assert output.metrics["rollout/lag_mean"] == 1.0
        assert all(request.sampling.seed >= 0 for request in engine.requests)
        seeds = {mix_seed(7, index) for index in range(4, 8)}
        assert not seeds & {request.sampling.seed for request in engine.requests}

    asyncio.run(scene())


def test_what_comes_back_too_old_starts_over():
    async def scene():
        source = FakeSource()
        (group,) = source.get_samples(1)
        for sample in group:
            sample.append_response_tokens(tokens=[97], log_probs=[-1.0])
            sample.weight_versions, sample.status = ["0"], Status.ABORTED
        source.add_samples([group])
        stream = make(FakeEngine(version=5), source)
        stream.starts_at(5, 8)
        stream.published(5)
        output = await stream(5)
        assert 0 in ids(output) and output.metrics["rollout/stale_groups"] == 1.0
        assert output.metrics["rollout/lag_max"] == 0.0

    asyncio.run(scene())


def test_refused_groups_are_gone_only_when_the_step_is_trained_that_tells_of_them():
    async def scene():
        stream = make(group_filter=lambda group: group[0].group_index != 1)
        stream.published(0)
        output = await stream(0)
        assert 1 not in ids(output) and output.metrics["rollout/dropped_groups"] == 1.0
        assert 1 in numbers(stream.unused())
        await train(stream, 0)
        assert 1 not in numbers(stream.unused())

    asyncio.run(scene())


def test_an_empty_source_ends_the_step():
    stream = make(source=FakeSource(num_groups=0))
    stream.published(0)
    with pytest.raises(RolloutError, match="gave no prompts"):
        asyncio.run(stream(0))


class Newest:
    """A buffer of a user's: the freshest first; may throw out, or lie."""

    def __init__(self, evict, most=99):
        self.evict, self.most, self.waiting = evict, most, []

    async def put(self, entry):
        self.waiting.append(entry)
        if len(self.waiting) > self.most:
            self.evict(self.waiting.pop(0).prompt_group)

    def get(self):
        return self.waiting.pop()

    def get_metrics(self):
        return {"size": float(len(self.waiting))}


def test_a_buffer_of_the_users_says_whose_turn_it_is_and_may_throw_out():
    async def scene():
        source, made = FakeSource(), []
        stream = make(
            source=source,
            make_buffer=lambda evict: made.append(Newest(evict)) or made[0],
        )
        stream.published(0)
        for step in range(4):
            output = await stream(step)
            assert output.metrics["rollout/lag_max"] <= 1.0
            assert "rollout/buffer/size" in output.metrics
            await turns()
            await train(stream, step)
        assert stream.window.pending == len(stream.unused())

    asyncio.run(scene())


def test_what_no_buffer_was_given_is_refused():
    class Lying(Newest):
        def get(self):
            return object()

    stream = make(make_buffer=Lying)
    stream.published(0)
    with pytest.raises(HookRunError, match="no waiting group"):
        asyncio.run(stream(0))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_lag", [1, 2, 4])
def test_over_a_long_run_every_group_is_in_one_place_and_the_bound_holds(seed, max_lag):
    async def scene():
        source = FakeSource()
        engine = FakeEngine(length=lambda s: (s ^ seed) % 61 + 1, version=0)
        stream = make(
            engine,
            source,
            num_steps=12,
            max_lag=max_lag,
            over_sampling_batch_size=3,
            group_filter=lambda group: (group[0].group_index + seed) % 5 != 0,
        )
        stream.published(0)
        kept, dropped = [], 0
        for step in range(12):
            output = await stream(step)
            kept += ids(output)
            dropped += output.metrics["rollout/dropped_groups"]
            for group in output.samples:
                assert all(step - sample.oldest_weight_version <= max_lag for sample in group)
            await turns(seed * 7)
            await train(stream, step)
        pending = numbers(stream.unused()) + numbers(source.buffer)
        assert len(kept) == len(set(kept)) == 24
        assert not set(kept) & set(pending)
        assert len(kept) + dropped + len(pending) == source.next_group
        await stream.close()

    asyncio.run(scene())
