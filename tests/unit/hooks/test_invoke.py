"""Calls that raise, hang, or forget what they are: what the run is told."""

import asyncio
import contextlib
import re
import threading
import time

import pytest

from dovetail.config.run import RunConfig
from dovetail.hooks import ArgsView, bind
from dovetail.types import (
    CorrectionCall,
    GenerateCall,
    HookRunError,
    RolloutCall,
    Sample,
    SamplingParams,
)

ARGS = ArgsView(RunConfig(), hook_timeout_s=0.2, generate_timeout_s=0.2, reward_timeout_s=0.2)


def run(slot, target, *values):
    result = bind(slot, target, ARGS)(*values)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


def group():
    return [Sample(group_index=3, index=6), Sample(group_index=3, index=7)]


def generate(target):
    call = GenerateCall(
        sample=Sample(index=5), sampling=SamplingParams(), engine=None, tokenizer=None, default=None
    )
    return run("custom_generate_function", target, call)


def sleeps(*_):
    time.sleep(60)


def spins(*_):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


async def waits(*_):
    await asyncio.sleep(60)


async def blocks(*_):
    time.sleep(60)


async def refuses_to_end(*_):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


def line_of(function, text):
    import inspect

    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


@pytest.mark.parametrize("hang", [sleeps, spins, waits, blocks, refuses_to_end])
def test_a_call_that_hangs_ends_with_its_name_its_samples_and_where_it_stands(hang):
    begun = time.monotonic()
    with pytest.raises(HookRunError) as caught:
        run("dynamic_sampling_filter", lambda group, hang=hang: hang(group), group())
    assert time.monotonic() - begun < 5
    text = str(caught.value)
    assert "--dynamic-sampling-filter-path (TOML: hooks.dynamic_sampling_filter_path)" in text
    assert "did not return within 0.2 s (samples 6, 7 of group 3)" in text
    assert "--hook-timeout-s SECONDS (TOML: hooks.hook_timeout_s)" in text
    assert f"it stands at {__file__}:{line_of(hang, 'sleep(')}, in {hang.__name__}" in text


@pytest.mark.parametrize("hang", [sleeps, spins, waits, blocks])
def test_where_the_group_is_dropped_or_the_sample_counted_the_error_is_no_end_of_the_run(hang):
    async def awaited(args, sample, sampling_params):
        await waits()

    target = awaited if hang is waits else lambda args, sample, sampling_params: hang()
    with pytest.raises(TimeoutError, match=r"within 0.2 s \(sample 5\).*--generate-timeout-s"):
        generate(target)
    with pytest.raises(TimeoutError, match=r"within 0.2 s \(sample 6\).*--reward-timeout-s"):
        run("custom_rm", lambda sample: hang(), group()[0])


def test_rollout_functions_may_take_as_long_as_they_like():
    def slow(call):
        time.sleep(0.4)
        return [group()]

    assert run("rollout_function", slow, RolloutCall(rollout_id=0)).samples


def test_a_call_on_another_thread_is_interrupted_too():
    caught = []

    def call():
        try:
            run("buffer_filter", lambda buffer, n: spins(), [group()], 1)
        except HookRunError as error:
            caught.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(5)
    assert not thread.is_alive() and "in spins" in caught[0]


def test_a_call_in_time_leaves_no_alarm_behind():
    assert run("dynamic_sampling_filter", lambda group: True, group()).keep
    time.sleep(0.3)


def test_being_cancelled_reaches_the_users_coroutine():
    ended = []

    async def patient(args, sample, sampling_params):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(sample.index)

    async def cancelled():
        args = ArgsView(RunConfig())
        call = GenerateCall(Sample(index=5), SamplingParams(), None, None, None)
        task = asyncio.ensure_future(bind("custom_generate_function", patient, args)(call))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert ended == [5]


def test_a_coroutine_that_a_plain_function_gives_back_is_awaited():
    async def real(group):
        return False

    assert not run("dynamic_sampling_filter", lambda group: real(group), group()).keep

    async def newest(buffer, num_samples):
        return [buffer.pop()]

    assert len(run("buffer_filter", lambda buffer, n: newest(buffer, n), [group()], 1)) == 1


def test_a_generator_is_called_what_it_is():
    def plain(groups):
        yield groups

    async def awaited(groups):
        yield groups

    for wrong in (plain, awaited):
        with pytest.raises(HookRunError, match=r"is a generator: it has `yield` in it"):
            run("rollout_sample_filter", wrong, [group()])


def test_what_a_function_raises_names_the_samples():
    def broken(sample, **_):
        raise KeyError("tool")

    with pytest.raises(HookRunError) as caught:
        run("rollout_sample_hook", broken, group()[0], 0, False)
    text = str(caught.value)
    assert "broken raised KeyError: 'tool' (sample 6)" in text
    assert f"(at {__file__}:{line_of(broken, 'raise')}, in broken)" in text
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(HookRunError, match=re.escape("(samples 6, 7 of group 3)")):
        run("custom_reward_post_process", lambda samples: 1 / 0, group())


def test_an_owner_can_have_an_error_explained_that_it_counted_first():
    def broken(sample):
        raise KeyError("tool")

    hook = bind("custom_rm", broken, ARGS)
    try:
        asyncio.run(hook(group()[1]))
    except KeyError as error:
        text = str(hook.invoke.explain(error, sample=group()[1]))
    assert "--custom-rm-path" in text and "raised KeyError: 'tool' (sample 7) (at " in text


def test_corrections_get_the_keywords_that_they_take():
    import torch

    call = CorrectionCall(
        pg_loss=torch.tensor([1.0]),
        train_log_probs=[torch.tensor([-1.0])],
        rollout_log_probs=[torch.tensor([-1.0])],
        loss_masks=[torch.ones(1)],
        total_lengths=[2],
        response_lengths=[1],
        max_seq_lens=[8],
    )

    def seven(
        args,
        *,
        pg_loss,
        train_log_probs,
        rollout_log_probs,
        loss_masks,
        total_lengths,
        response_lengths,
    ):
        return pg_loss * 2, loss_masks, {}

    def nine(args, pg_loss, loss_masks, parallel_state, max_seq_lens, **kwargs):
        assert max_seq_lens == [8] and parallel_state is None and len(kwargs) == 4
        return pg_loss * 3, loss_masks, None

    def anything(**kwargs):
        return kwargs["pg_loss"] * len(kwargs), kwargs["loss_masks"], {}

    slot = "custom_tis_function"
    assert run(slot, seven, call)[0].item() == 2
    assert run(slot, nine, call)[0].item() == 3 and run(slot, nine, call)[2] == {}
    assert run(slot, anything, call)[0].item() == 9
