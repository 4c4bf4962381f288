"""One sample through the default generate function."""

import asyncio

import pytest

from dovetail.rollout.generate import generate
from dovetail.types import DataError, Sample, SamplingParams
from tests.unit.rollout.fakes import FakeEngine, FakeTokenizer, letter

Status = Sample.Status


def answer(engine, sample, sampling=None, **kwargs):
    sampling = sampling or SamplingParams(max_new_tokens=8, seed=5)
    return asyncio.run(generate(engine, FakeTokenizer(), sample, sampling, **kwargs))


def fresh():
    return Sample(index=3, prompt="hi", tokens=[104, 105])


def test_a_fresh_sample_is_completed_with_everything_aligned():
    sample = answer(FakeEngine(), fresh())
    expected = [letter(5, i) for i in range(4)]
    assert sample.status is Status.COMPLETED and sample.tokens == [104, 105, *expected]
    assert sample.response == "".join(map(chr, expected)) and sample.response_length == 4
    assert sample.loss_mask == [1] * 4 and sample.rollout_log_probs == [-0.5] * 4
    assert sample.weight_versions == ["1"] and sample.prefix_cache_info.total_prompt_tokens == 2


def test_finished_samples_are_returned_without_a_request():
    engine = FakeEngine()
    for status in (Status.COMPLETED, Status.TRUNCATED, "completed"):
        sample = fresh()
        sample.status = status
        assert answer(engine, sample) is sample
    assert engine.requests == []


def test_an_aborted_sample_goes_on_where_it_stopped_and_equals_an_uninterrupted_one():
    whole = answer(FakeEngine(), fresh())
    sample = fresh()
    sample.append_response_tokens(
        tokens=[letter(5, 0), letter(5, 1)], log_probs=[-0.5, -0.5], text="xx"
    )
    sample.weight_versions, sample.status = ["0"], Status.ABORTED
    engine = FakeEngine()
    answer(engine, sample)
    (request,) = engine.requests
    assert (request.num_generated, request.sampling.max_new_tokens) == (2, 6)
    assert (sample.tokens, sample.response) == (whole.tokens, whole.response)
    assert sample.weight_versions == ["0", "1"] and sample.status is Status.COMPLETED
    assert sample.loss_mask == [1] * 4


def test_the_old_part_of_a_resumed_sample_is_masked_on_request():
    sample = fresh()
    sample.append_response_tokens(tokens=[97], log_probs=[-0.1], text="a")
    sample.status = Status.ABORTED
    answer(FakeEngine(), sample, mask_offpolicy=True)
    assert sample.loss_mask == [0, 1, 1, 1]


def test_the_context_limit_bounds_prompt_plus_response():
    engine = FakeEngine(length=lambda seed: 100)
    sample = answer(engine, fresh(), max_context_len=5)
    assert len(sample.tokens) == 5 and sample.status is Status.TRUNCATED


def test_a_sample_without_room_is_truncated_without_a_request():
    engine = FakeEngine()
    assert answer(engine, fresh(), max_context_len=2).status is Status.TRUNCATED
    full = fresh()
    full.append_response_tokens(tokens=[97] * 8, log_probs=[-0.1] * 8)
    full.status = Status.ABORTED
    assert answer(engine, full).status is Status.TRUNCATED
    assert engine.requests == []


def test_an_aborted_request_keeps_its_tokens():
    async def scene():
        engine, sample = FakeEngine(length=lambda seed: 50), fresh()
        task = asyncio.create_task(
            generate(engine, FakeTokenizer(), sample, SamplingParams(max_new_tokens=50, seed=5))
        )
        for _ in range(4):
            await asyncio.sleep(0)
        await engine.abort()
        return await task

    sample = asyncio.run(scene())
    assert sample.status is Status.ABORTED and 0 < sample.response_length < 50


def test_prompts_without_tokens_are_encoded():
    assert answer(FakeEngine(), Sample(prompt="ab")).tokens[:2] == [97, 98]
    chat = Sample(prompt=[{"role": "user", "content": "ab"}])
    assert answer(FakeEngine(), chat).tokens[:2] == [97, 98]


def test_a_sample_without_prompt_is_refused():
    with pytest.raises(DataError, match="sample 7 of group 2 has neither tokens nor a prompt"):
        answer(FakeEngine(), Sample(index=7, group_index=2))
