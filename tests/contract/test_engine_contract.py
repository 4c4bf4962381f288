"""What every engine promises. Point `ENGINES` at one more maker to hold it to the same."""

import asyncio
import random

import pytest

from dovetail.types.calls import FinishReason
from dovetail.types.errors import EngineError, RequestTooLongError
from dovetail.types.ports import Engine, EngineControl
from tests.unit.engines.tiny import (
    VOCAB,
    CharTokenizer,
    generate,
    prompt_of,
    request,
    tiny_engine,
    tiny_model,
    worst_logprob_error,
)

ENGINES = {
    "generic": lambda **kw: tiny_engine(tokenizer=CharTokenizer(), **{"fused": "off", **kw}),
    "fused": lambda **kw: tiny_engine(tokenizer=CharTokenizer(), **{"fused": "on", **kw}),
}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES.keys())
def make(request):
    return request.param


def group(count, length=12, seed=0, **sampling):
    prompt = prompt_of(length, seed)
    return [
        request(f"{seed}.{k}", prompt, **{"seed": 10 * seed + k, **sampling}) for k in range(count)
    ]


def facts(results):
    return [(r.token_ids, r.logprobs, r.finish_reason) for r in results]


async def settle(turns=200):
    for _ in range(turns):
        await asyncio.sleep(0.001)


def test_it_is_an_engine_and_can_be_controlled(make):
    engine = make()
    assert isinstance(engine, Engine) and isinstance(engine, EngineControl)


def test_a_fresh_engine_gives_the_same_bits_for_the_same_requests(make):
    asked = [
        r for seed in range(4) for r in group(4, 5 + 9 * seed, seed, max_new_tokens=4 + 5 * seed)
    ]
    assert facts(generate(make(), asked)) == facts(generate(make(), asked))


def test_tokens_do_not_depend_on_the_company_they_are_sampled_in(make):
    asked = [r for seed in range(3) for r in group(3, 20, seed, max_new_tokens=12)]
    together = generate(make(), asked)
    alone = [generate(make(max_running=1), [r])[0] for r in asked]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_response_in_two_parts_equals_the_whole(make):
    whole = generate(make(), [request("w", prompt_of(9), max_new_tokens=20, seed=5)])[0]
    begun = (*prompt_of(9), *whole.token_ids[:8])
    rest = request("r", begun, num_generated=8, max_new_tokens=12, seed=5)
    assert generate(make(), [rest])[0].token_ids == whole.token_ids[8:]


def test_a_prompt_of_a_group_is_computed_once(make):
    engine = make()
    results = generate(engine, group(5, 30))
    assert sorted(r.cached_tokens for r in results) == [0, 29, 29, 29, 29]
    assert engine.stats.prefill_tokens == 29
    assert all(r.prompt_tokens == 30 for r in results)


def test_places_of_finished_sequences_are_taken_at_once_and_no_dead_row_is_computed(make):
    engine = make(max_running=4)
    lengths = [2, 30, 3, 5, 4, 2, 6, 3, 7, 2]
    asked = [request(i, prompt_of(6, i), max_new_tokens=n, seed=i) for i, n in enumerate(lengths)]
    assert [len(r.token_ids) for r in generate(engine, asked)] == lengths
    assert engine.stats.decoded_rows == sum(lengths)
    assert engine.stats.decode_steps <= 34


def test_responses_end_at_eos_stop_ids_and_limits_and_keep_the_ending_token(make):
    engine = make(eos_token_ids=(2,), kv_tokens=4000)
    asked = [
        request(i, prompt_of(6), max_new_tokens=150, seed=i, temperature=3.0) for i in range(8)
    ]
    for result in generate(engine, asked):
        ended = 2 in result.token_ids
        assert result.finish_reason == (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert 2 not in result.token_ids[:-1]
    ignoring = [
        request(i, prompt_of(6), max_new_tokens=150, seed=i, temperature=3.0, ignore_eos=True)
        for i in range(8)
    ]
    results = generate(engine, ignoring)
    assert {r.finish_reason for r in results} == {FinishReason.LENGTH}
    assert any(2 in r.token_ids[:-1] for r in results)
    stop = results[0].token_ids[5]
    stopped = request(
        0,
        prompt_of(6),
        max_new_tokens=150,
        temperature=3.0,
        ignore_eos=True,
        stop_token_ids=(stop,),
    )
    first = results[0].token_ids.index(stop)
    assert generate(engine, [stopped])[0].token_ids == results[0].token_ids[: first + 1]


def test_no_stop_before_min_new_tokens_counting_what_an_earlier_part_generated(make):
    every = tuple(range(3, VOCAB, 2))
    settings = {"max_new_tokens": 40, "min_new_tokens": 10, "stop_token_ids": every}
    results = generate(make(), [request(i, prompt_of(6), seed=i, **settings) for i in range(6)])
    for result in results:
        assert len(result.token_ids) >= 10
        assert not set(result.token_ids[:9]) & set(every)
    resumed = (*prompt_of(6), 4, 4, 4, 4, 4, 4, 4, 4)
    results = generate(
        make(), [request(i, resumed, num_generated=8, seed=i, **settings) for i in range(6)]
    )
    assert min(len(r.token_ids) for r in results) < 10


def test_stop_strings_are_found_across_tokens_and_across_the_seam_of_two_parts(make):
    engine = make()
    free = generate(engine, [request("f", prompt_of(6), max_new_tokens=30)])[0]
    stop = free.text[10:13]
    at = free.text.index(stop)
    assert "<s>" not in free.text[: at + 3]
    stopped = generate(
        engine, [request("s", prompt_of(6), max_new_tokens=30, stop=("zzzz", stop))]
    )[0]
    assert stopped.text == free.text[: at + 3]
    assert stopped.finish_reason is FinishReason.STOP
    begun = (*prompt_of(6), *free.token_ids[: at + 2])
    rest = generate(
        engine,
        [request("r", begun, num_generated=at + 2, max_new_tokens=30, stop=(stop,))],
    )[0]
    assert rest.token_ids == free.token_ids[at + 2 : at + 3]


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(make):
    engine = make(kv_tokens=64, max_context_len=100)
    with pytest.raises(RequestTooLongError, match=r"60 prompt tokens.*= 68 tokens.*100.*64"):
        generate(engine, [request("x", prompt_of(60))])
    with pytest.raises(RequestTooLongError, match=r"= 108 tokens"):
        generate(make(max_context_len=100), [request("x", prompt_of(100))])


@pytest.mark.parametrize(
    "bad", [request("x", ()), request("x", (VOCAB,)), request("x", (5, -1)), request("x", (5,), 2)]
)
def test_malformed_requests_are_refused_and_leave_the_engine_usable(make, bad):
    engine = make()
    with pytest.raises(EngineError, match="'x'"):
        generate(engine, [bad])
    assert len(generate(engine, [request("y", (5,))])[0].token_ids) == 8


def test_requests_that_do_not_fit_now_wait_and_all_are_served_exactly(make):
    model = tiny_model()
    engine = make(model=model, kv_tokens=80, max_running=16)
    asked = [r for seed in range(5) for r in group(4, 8 + 5 * seed, seed, max_new_tokens=40)]
    results = generate(engine, asked)
    assert [len(r.token_ids) for r in results] == [40] * 20
    assert worst_logprob_error(model, asked, results) < 1e-4
    assert engine.stats.kv_tokens_peak <= 80
    assert engine.stats.kv_tokens_used == 0
    roomy = generate(make(model=model, kv_tokens=5000, max_running=16), asked)
    assert [r.token_ids for r in results] == [r.token_ids for r in roomy]


def test_an_abort_keeps_what_was_generated_and_reaches_waiting_requests(make):
    engine = make(max_running=2)

    async def run():
        calls = [
            asyncio.ensure_future(
                engine.generate(request(i, prompt_of(5), max_new_tokens=190, seed=i))
            )
            for i in range(4)
        ]
        while engine.stats.generated_tokens < 20:
            await asyncio.sleep(0.001)
        await engine.abort(["0"])
        first = await calls[0]
        await engine.abort()
        return first, await asyncio.gather(*calls[1:])

    first, others = asyncio.run(run())
    assert first.finish_reason is FinishReason.ABORT and len(first.token_ids) >= 5
    assert [r.finish_reason for r in others] == [FinishReason.ABORT] * 3
    assert others[-1].token_ids == [] and others[-1].version_spans == ()
    whole = generate(engine, [request(0, prompt_of(5), max_new_tokens=190, seed=0)])[0]
    assert whole.token_ids[: len(first.token_ids)] == first.token_ids
    assert engine.stats.kv_tokens_used == 0


def test_pause_holds_and_new_weights_mark_the_tokens_that_follow(make):
    model = tiny_model()
    engine = make(model=model)
    asked = request("p", prompt_of(40), max_new_tokens=100, seed=1)

    async def run():
        await engine.receive_weights(3, None)
        call = asyncio.ensure_future(engine.generate(asked))
        while engine.stats.generated_tokens < 10:
            await asyncio.sleep(0.001)
        await engine.pause()
        held = engine.stats.generated_tokens
        await settle(20)
        assert engine.stats.generated_tokens == held and not call.done()
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        await engine.receive_weights(4, [(name, p * 0.9) for name, p in old.items()])
        assert engine.weight_version == 4
        await engine.resume()
        result = await call
        return held, result

    held, result = asyncio.run(run())
    spans = [(s.weight_version, s.start, s.end) for s in result.version_spans]
    assert spans == [(3, 0, held), (4, held, 100)]
    # The second part is what the new weights say of the whole sequence, keys and values too.
    rest = request(
        "q", (*asked.prompt_ids, *result.token_ids[:held]), held, max_new_tokens=100 - held, seed=1
    )
    again = generate(engine, [rest])[0]
    assert again.token_ids == result.token_ids[held:]
    assert again.logprobs == pytest.approx(result.logprobs[held:], abs=1e-4)


def test_weights_of_another_name_or_shape_are_refused(make):
    import torch

    engine = make()
    for name, shape in (("nonsense", (2,)), ("model.norm.weight", (5,))):
        with pytest.raises(EngineError, match=name):
            asyncio.run(engine.receive_weights(1, [(name, torch.zeros(shape))]))


def test_close_ends_requests_with_abort_and_refuses_later_ones(make):
    engine = make()

    async def run():
        call = asyncio.ensure_future(
            engine.generate(request("c", prompt_of(5), max_new_tokens=190))
        )
        await settle(5)
        await engine.close()
        await engine.close()
        return await call

    assert asyncio.run(run()).finish_reason is FinishReason.ABORT
    with pytest.raises(EngineError, match="closed"):
        generate(engine, [request("d", (5,))])


def test_it_works_over_several_runs_of_one_loop_and_over_several_loops(make):
    engine = make()
    wanted = facts(generate(make(), group(3)))
    with asyncio.Runner() as runner:

        async def some():
            return await asyncio.gather(*(engine.generate(r) for r in group(3)))

        for _ in range(5):
            assert facts(runner.run(some())) == wanted
    for _ in range(3):
        assert facts(generate(engine, group(3))) == wanted


def test_a_loop_that_dies_in_the_middle_leaves_a_usable_engine(make):
    engine = make()

    async def leave():
        calls = [asyncio.ensure_future(engine.generate(r)) for r in group(3, max_new_tokens=180)]
        await settle(10)
        return calls

    asyncio.run(leave())
    assert facts(generate(engine, group(3))) == facts(generate(make(), group(3)))
    assert engine.stats.kv_tokens_used == 0


def test_a_cancelled_caller_frees_its_place(make):
    engine = make(max_running=1)

    async def run():
        call = asyncio.ensure_future(
            engine.generate(request("a", prompt_of(5), max_new_tokens=190))
        )
        await settle(10)
        call.cancel()
        return await engine.generate(request("b", prompt_of(5)))

    assert len(asyncio.run(run()).token_ids) == 8
    assert engine.stats.kv_tokens_used == 0


def test_an_error_inside_a_step_reaches_everyone_and_the_engine_goes_on(make, monkeypatch):
    engine = make(max_running=2)
    runner, decode = engine._core.runner, engine._core.runner.decode
    calls = []

    def failing(batch):
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError("the fault")
        return decode(batch)

    monkeypatch.setattr(runner, "decode", failing)

    async def run():
        asked = [request(i, prompt_of(5, i)) for i in range(5)]
        return await asyncio.gather(*map(engine.generate, asked), return_exceptions=True)

    errors = asyncio.run(run())
    assert all(isinstance(e, EngineError) and "the fault" in str(e) for e in errors)
    fresh = make(max_running=2)
    assert facts(generate(engine, group(3))) == facts(generate(fresh, group(3)))


def test_damaged_weights_are_named_instead_of_sampled_from(make):
    import torch

    model = tiny_model()
    engine = make(model=model)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(EngineError, match="not finite"):
        generate(engine, [request("n", (5,))])
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(0.1)
    asked = [request(i, prompt_of(3 + i, i)) for i in range(4)]
    assert worst_logprob_error(model, asked, generate(engine, asked)) < 1e-4


def test_thousands_of_random_aborts_leak_no_place(make):
    engine = make(kv_tokens=150, max_running=6)
    chooser = random.Random(3)

    async def one(i):
        asked = request(i, prompt_of(chooser.randint(1, 30), i % 7), max_new_tokens=40, seed=i)
        return await engine.generate(asked)

    async def run():
        aborted = 0
        for start in range(0, 1500, 50):
            calls = [asyncio.ensure_future(one(i)) for i in range(start, start + 50)]
            while any(not c.done() for c in calls):
                await asyncio.sleep(0.0005)
                await engine.abort(
                    [str(i) for i in range(start, start + 50) if chooser.random() < 0.4]
                )
            for result in [c.result() for c in calls]:
                aborted += result.finish_reason is FinishReason.ABORT
                assert len(result.token_ids) == len(result.logprobs)
                assert sum(s.end - s.start for s in result.version_spans) == len(result.token_ids)
        return aborted

    assert asyncio.run(run()) > 500
    assert engine.stats.kv_tokens_used == 0
    assert not engine._open and not engine._core.has_work
    assert facts(generate(engine, group(3))) == facts(generate(make(), group(3)))


def test_no_new_tokens_asked_for_gives_none(make):
    result = generate(make(), [request("z", (5,), max_new_tokens=0)])[0]
    assert (result.token_ids, result.finish_reason) == ([], FinishReason.LENGTH)


def test_without_a_seed_two_samples_differ(make):
    results = generate(
        make(), [request(i, prompt_of(5), seed=None, temperature=2.0) for i in range(2)]
    )
    assert results[0].token_ids != results[1].token_ids
