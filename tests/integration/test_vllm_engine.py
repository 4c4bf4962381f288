"""The client against a real vLLM on this machine's CPU: requests, control, weights."""

import asyncio
import contextlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dovetail.checkpoint.hf_names import named_tensors, num_bytes
from dovetail.engines.embedded.engine import EmbeddedEngine
from dovetail.transport.place import Wanted
from dovetail.transport.snapshot import SnapshotStore
from dovetail.types.calls import FinishReason, GenerateRequest, SamplingParams, ScoreRequest
from dovetail.types.errors import EngineError, EngineGoneError, RequestTooLongError
from dovetail.types.ports import RemoteEngine, ScoringEngine
from dovetail.types.weights import Snapshot
from tests.integration.vllm_server import CONTEXT, EOS, restore

# One server is enough: with xdist all of these run in one process (--dist loadgroup).
pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.timeout(600), pytest.mark.slow]

CLOSE = 2e-5
PROMPT = (3, 4, 12, 5, 6, 15)


def ask(name, prompt=PROMPT, num_generated=0, **sampling):
    params = {"max_new_tokens": 12, "seed": 7, **sampling}
    return GenerateRequest(str(name), tuple(prompt), SamplingParams(**params), num_generated)


def several(count, **sampling):
    return [ask(i, (2 + i % 10, *PROMPT), **{"seed": i, **sampling}) for i in range(count)]


def run(server, work, **settings):
    """`await work(client)`, within two minutes, and every request ended."""

    async def everything():
        client = server.client(**settings)
        try:
            return await asyncio.wait_for(work(client), 120)
        finally:
            await client.resume()
            await client.close()

    return asyncio.run(everything())


async def generate(engine, requests):
    return await asyncio.gather(*(engine.generate(one) for one in requests))


def load_model(server):
    return AutoModelForCausalLM.from_pretrained(server.model_dir, dtype=torch.float32)


def logprobs_of(model, ids, temperature=1.0):
    """[len(ids) - 1, vocabulary]: log_softmax(logits / temperature) behind each token but the
    last."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0, :-1].float()
    return torch.log_softmax(logits / (temperature or 1.0), -1)


def worst_error(model, requests, results):
    """Largest |engine's logprob - the model's| under the convention of `SamplingParams`."""
    worst = 0.0
    for asked, got in zip(requests, results, strict=True):
        ids = [*asked.prompt_ids, *got.token_ids]
        table = logprobs_of(model, ids, asked.sampling.temperature)
        new = torch.tensor(got.token_ids)
        wanted = table[len(asked.prompt_ids) - 1 :].gather(1, new[:, None])[:, 0]
        worst = max(worst, float((wanted - torch.tensor(got.logprobs)).abs().max()))
    return worst


@contextlib.contextmanager
def versions(server):
    """Writes further versions of the weights; at the end the first ones are back."""
    model = load_model(server)
    store = SnapshotStore(Wanted(num_bytes=num_bytes(model)), server.model_dir)
    try:
        yield model, store
    finally:
        store.close()
        restore(server)


def change(model, seed):
    """Every weight, as a step of training does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)


def test_it_is_a_remote_engine_that_scores(vllm_server):
    client = vllm_server.client()
    assert isinstance(client, RemoteEngine) and isinstance(client, ScoringEngine)
    assert client.url == vllm_server.url and client.dialect == "vllm"


def test_greedy_tokens_and_logprobs_are_those_of_the_embedded_engine(vllm_server):
    asked = several(12, temperature=0.0, max_new_tokens=40)
    model = load_model(vllm_server)
    embedded = EmbeddedEngine(
        model, None, max_running=12, kv_tokens=4000, max_context_len=CONTEXT, eos_token_ids=(EOS,)
    )

    async def work(client):
        return await generate(client, asked), await generate(embedded, asked)

    got, wanted = run(vllm_server, work)
    assert [r.token_ids for r in got] == [r.token_ids for r in wanted]
    assert [r.finish_reason for r in got] == [r.finish_reason for r in wanted]
    for one, other in zip(got, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=CLOSE)
        assert one.prompt_tokens == 7 and sum(s.end for s in one.version_spans) == len(
            one.token_ids
        )
    assert worst_error(model, asked, got) < CLOSE
    asyncio.run(embedded.close())


def test_logprobs_at_temperature_1_are_the_models_whatever_candidates_are_cut(vllm_server):
    cuts = [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"min_new_tokens": 10}]
    asked = [one for cut in cuts for one in several(4, **cut)]
    got = run(vllm_server, lambda client: generate(client, asked))
    assert worst_error(load_model(vllm_server), asked, got) < CLOSE
    assert len({tuple(r.token_ids) for r in got}) > 10


def test_a_seed_gives_the_same_tokens_again_and_a_continuation_its_own_draws(vllm_server):
    async def work(client):
        first = await generate(client, several(6, ignore_eos=True))
        again = await generate(client, several(6, ignore_eos=True))
        # Near uniform: equal draws would give mostly equal tokens.
        whole = await client.generate(ask("w", ignore_eos=True, temperature=2.0))
        begun = (*PROMPT, *whole.token_ids)
        rest = await client.generate(
            ask("r", begun, len(whole.token_ids), ignore_eos=True, temperature=2.0)
        )
        return first, again, whole, rest

    first, again, whole, rest = run(vllm_server, work)
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    same = sum(a == b for a, b in zip(whole.token_ids, rest.token_ids, strict=True))
    assert same <= 6


def test_responses_end_at_eos_stop_ids_and_limits_and_keep_the_ending_token(vllm_server):
    free = several(8, max_new_tokens=150, temperature=1.5)
    ignoring = several(8, max_new_tokens=150, temperature=1.5, ignore_eos=True)

    async def work(client):
        ended, endless = await generate(client, free), await generate(client, ignoring)
        stop = endless[0].token_ids[5]
        asked = several(
            1, max_new_tokens=150, temperature=1.5, ignore_eos=True, stop_token_ids=(stop,)
        )
        return ended, endless, stop, await generate(client, asked)

    ended, endless, stop, (stopped,) = run(vllm_server, work)
    for result in ended:
        reason = FinishReason.STOP if EOS in result.token_ids else FinishReason.LENGTH
        assert result.finish_reason is reason and EOS not in result.token_ids[:-1]
    assert any(r.finish_reason is FinishReason.STOP for r in ended)
    assert {r.finish_reason for r in endless} == {FinishReason.LENGTH}
    assert {len(r.token_ids) for r in endless} == {150}
    assert stopped.token_ids[-1] == stop and stop not in stopped.token_ids[:-1]
    assert stopped.token_ids == endless[0].token_ids[: len(stopped.token_ids)]


def test_no_stop_before_min_new_tokens_counting_what_an_earlier_part_generated(vllm_server):
    stops = tuple(range(2, 12))
    settings = {"max_new_tokens": 30, "min_new_tokens": 10, "stop_token_ids": stops}
    begun = (*PROMPT, *(13,) * 8)

    async def work(client):
        whole = await generate(client, several(6, **settings))
        rest = await generate(
            client, [ask(i, begun, 8, **{**settings, "seed": i}) for i in range(6)]
        )
        return whole, rest

    whole, rest = run(vllm_server, work)
    for result in whole:
        assert not set(result.token_ids[:9]) & {*stops, EOS} and len(result.token_ids) >= 10
    assert min(len(r.token_ids) for r in rest) < 10
    assert all(not set(r.token_ids[:1]) & {*stops, EOS} for r in rest)


def test_stop_strings_keep_their_last_token_and_are_found_across_the_seam_of_two_parts(vllm_server):
    settings = {"temperature": 1.0, "ignore_eos": True, "max_new_tokens": 40}

    async def work(client):
        free = await client.generate(ask("f", **settings))
        stop = free.text[10:13]
        at = free.text.index(stop)
        stopped = await client.generate(ask("s", stop=("zzzz", stop), **settings))
        begun = (*PROMPT, *free.token_ids[: at + 2])
        tries = [
            await client.generate(ask(i, begun, at + 2, stop=(stop,), **{**settings, "seed": i}))
            for i in range(20)
        ]
        return free, stop, at, stopped, tries

    free, stop, at, stopped, tries = run(vllm_server, work)
    assert stopped.text == free.text[: at + 3] and stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == free.token_ids[: at + 3]
    completing = [r for r in tries if r.text.startswith(stop[2])]
    assert completing
    for result in completing:
        assert result.finish_reason is FinishReason.STOP
        assert len(result.token_ids) == len(result.logprobs) == 1
        assert [(s.start, s.end) for s in result.version_spans] == [(0, 1)]


def test_prompt_logprobs_are_the_models_at_any_temperature(vllm_server):
    ids = (*PROMPT, 7, 8, 9, 10)
    model = load_model(vllm_server)

    async def work(client):
        return [
            await client.score(ScoreRequest("s", ids, start, temperature, top))
            for start, temperature, top in [(1, 1.0, 0), (7, 1.0, 3), (4, 0.7, 2), (10, 1.0, 0)]
        ]

    plain, tail, warm, nothing = run(vllm_server, work)
    table, warm_table = logprobs_of(model, ids), logprobs_of(model, ids, 0.7)
    wanted = table.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert plain.logprobs == pytest.approx(wanted, abs=CLOSE) and plain.top == [[]] * 9
    assert tail.logprobs == pytest.approx(wanted[6:], abs=CLOSE)
    for found, row in zip(tail.top, table[6:], strict=True):
        best = torch.topk(row, 3)
        assert [token for token, _ in found] == best.indices.tolist()
        assert [one for _, one in found] == pytest.approx(best.values.tolist(), abs=CLOSE)
    picked = warm_table[3:].gather(1, torch.tensor(ids[4:])[:, None])[:, 0].tolist()
    assert warm.logprobs == pytest.approx(picked, abs=CLOSE)
    assert [len(found) for found in warm.top] == [2] * 6
    assert nothing.logprobs == [] and nothing.weight_version == 0


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(vllm_server):
    async def work(client):
        with pytest.raises(RequestTooLongError, match=r"6 prompt tokens.*= 518 tokens.*512"):
            await client.generate(ask("x", max_new_tokens=512))
        with pytest.raises(RequestTooLongError, match="512 tokens to score"):
            await client.score(ScoreRequest("x", (5,) * 512))

    run(vllm_server, work)

    async def mistaken(client):
        with pytest.raises(RequestTooLongError, match="'x'"):
            await client.generate(ask("x", (5,) * 600, max_new_tokens=4))

    run(vllm_server, mistaken, max_context_len=4000)


def test_malformed_requests_are_refused_and_leave_the_engine_usable(vllm_server):
    async def work(client):
        for bad in [ask("x", ()), ask("x", (16,)), ask("x", (5, -1)), ask("x", (5,), 2)]:
            with pytest.raises(EngineError, match="'x'"):
                await client.generate(bad)
        with pytest.raises(EngineError, match="'x'"):
            await client.generate(ask("x", top_p=7.0))
        return await client.generate(ask("y", max_new_tokens=0))

    result = run(vllm_server, work)
    assert (result.token_ids, result.finish_reason) == ([], FinishReason.LENGTH)


def test_an_abort_keeps_what_was_generated_and_reaches_waiting_requests(vllm_server):
    asked = several(24, max_new_tokens=480, ignore_eos=True)  # The server runs 16 at once.

    async def work(client):
        calls = [asyncio.create_task(client.generate(one)) for one in asked]
        await asyncio.sleep(1.0)
        await client.abort(["0"])
        first = await calls[0]
        held = [call.done() for call in calls[1:]]
        await client.abort()
        others = await asyncio.gather(*calls[1:])
        whole = await client.generate(asked[0])
        return first, held, others, whole

    first, held, others, whole = run(vllm_server, work)
    assert first.finish_reason is FinishReason.ABORT and 0 < len(first.token_ids) < 480
    assert first.token_ids == whole.token_ids[: len(first.token_ids)]
    assert len(first.logprobs) == len(first.token_ids) == first.version_spans[-1].end
    assert not any(held)
    assert {r.finish_reason for r in others} == {FinishReason.ABORT}
    assert others[-1].token_ids == [] and others[-1].version_spans == ()


def test_requests_that_are_held_by_a_pause_can_be_aborted(vllm_server):
    async def work(client):
        calls = [
            asyncio.create_task(client.generate(one))
            for one in several(3, max_new_tokens=480, ignore_eos=True)
        ]
        await asyncio.sleep(0.5)
        await client.pause()
        late = asyncio.create_task(client.generate(ask("late")))
        await asyncio.sleep(0.3)
        assert not any(call.done() for call in [*calls, late])
        await client.abort()
        return await asyncio.gather(*calls, late)

    assert {r.finish_reason for r in run(vllm_server, work)} == {FinishReason.ABORT}


def test_a_cancelled_caller_is_forgotten_by_the_server(vllm_server):
    async def work(client):
        calls = [
            asyncio.create_task(client.generate(one))
            for one in several(16, max_new_tokens=480, ignore_eos=True)
        ]
        await asyncio.sleep(0.5)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        load = client._http
        for _ in range(100):
            text = await load.tell("/metrics", method="GET")
            lines = [one for one in text.splitlines() if "num_requests_running{" in one]
            if lines and float(lines[0].rsplit(" ", 1)[1]) == 0.0:
                return True
            await asyncio.sleep(0.1)
        return False

    assert run(vllm_server, work)


def test_after_every_update_greedy_logprobs_are_the_new_weights_and_answers_say_so(vllm_server):
    asked = several(8, temperature=0.0, max_new_tokens=24)

    async def publish(client, snapshot):
        await client.pause()
        await client.load_snapshot(snapshot)
        await client.resume()
        return await generate(client, asked), await client.weight_version()

    with versions(vllm_server) as (model, store):
        before = run(vllm_server, lambda client: generate(client, asked))
        for version in (1, 2, 3):
            change(model, version)
            snapshot = store.write(version, named_tensors(model))
            got, said = run(vllm_server, lambda client, s=snapshot: publish(client, s))
            assert said == version
            assert all(
                [(s.weight_version, s.start, s.end) for s in r.version_spans]
                == [(version, 0, len(r.token_ids))]
                for r in got
            )
            assert worst_error(model, asked, got) < CLOSE
            assert [r.token_ids for r in got] != [r.token_ids for r in before]
            before = got


def test_requests_under_way_go_on_under_new_weights_with_a_span_for_each(vllm_server):
    asked = several(6, max_new_tokens=400, ignore_eos=True)

    async def work(client, snapshots):
        await client.load_snapshot(snapshots[0])
        calls = [asyncio.create_task(client.generate(one)) for one in asked]
        for snapshot in snapshots[1:]:
            await asyncio.sleep(0.6)
            await client.pause()
            assert not any(call.done() for call in calls)
            await client.load_snapshot(snapshot)
            await client.resume()
        return await asyncio.gather(*calls)

    with versions(vllm_server) as (model, store):
        models, snapshots = [], []
        for version in (5, 6, 7):
            change(model, version)
            copy = load_model(vllm_server)
            copy.load_state_dict(model.state_dict())
            models.append(copy)
            snapshots.append(store.write(version, named_tensors(model)))
        got = run(vllm_server, lambda client: work(client, snapshots))
        for one, result in zip(asked, got, strict=True):
            spans = result.version_spans
            assert [s.weight_version for s in spans] == [5, 6, 7]
            assert [s.start for s in spans[1:]] == [s.end for s in spans[:-1]]
            assert (spans[0].start, spans[-1].end) == (0, 400)
            # Keys and values too: each part is what its weights say of everything before it.
            new = torch.tensor(result.token_ids)
            for span, weights in zip(spans, models, strict=True):
                table = logprobs_of(weights, [*one.prompt_ids, *result.token_ids])
                wanted = table[len(one.prompt_ids) - 1 :].gather(1, new[:, None])[:, 0]
                part = slice(span.start, span.end)
                assert result.logprobs[part] == pytest.approx(wanted[part].tolist(), abs=1e-4)


@pytest.mark.parametrize("fault", ["cut off", "a tensor less", "another shape", "no file", "bytes"])
def test_a_damaged_snapshot_is_an_error_and_leaves_the_old_weights(vllm_server, tmp_path, fault):
    asked = several(4, temperature=0.0)
    tensors = load_file(vllm_server.model_dir / "model.safetensors")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    snapshot = Snapshot(99, tmp_path, size + 4 if fault == "bytes" else size)
    if fault == "a tensor less":
        tensors.pop("model.norm.weight")
        snapshot = Snapshot(99, tmp_path, size - 512)
    if fault == "another shape":
        tensors["model.norm.weight"] = torch.ones(64, dtype=torch.float64)
    if fault != "no file":
        save_file(tensors, tmp_path / "model.safetensors")
    if fault == "cut off":
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:-64])

    async def work(client):
        running = asyncio.create_task(
            client.generate(ask("r", max_new_tokens=300, ignore_eos=True, temperature=0.0))
        )
        await asyncio.sleep(0.2)
        with pytest.raises(EngineError, match=r"version 99 did not reach .*snapshot refused"):
            await client.load_snapshot(snapshot)
        return await running, await generate(client, asked), await client.weight_version()

    running, got, said = run(vllm_server, work)
    assert said in (None, 0)
    assert {s.weight_version for r in [running, *got] for s in r.version_spans} == {0}
    assert worst_error(load_model(vllm_server), asked, got) < CLOSE
    assert len(running.token_ids) == 300


def test_weights_without_finite_figures_are_named_instead_of_sampled_from(vllm_server):
    with versions(vllm_server) as (model, store):
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))
        snapshot = store.write(8, named_tensors(model))

        async def work(client):
            await client.load_snapshot(snapshot)
            with pytest.raises(EngineError, match="not finite; weights of version 8"):
                await client.generate(ask("n"))

        run(vllm_server, work)


def test_sleep_holds_requests_until_wake(vllm_server):
    """vLLM on a CPU keeps its memory while it sleeps."""

    async def work(client):
        await client.sleep()
        assert await client.healthy(5.0)
        assert (await client._http.get("/is_sleeping"))["is_sleeping"]
        call = asyncio.create_task(client.generate(ask("z", temperature=0.0)))
        await asyncio.sleep(0.5)
        assert not call.done()
        await client.wake()
        return await call

    assert len(run(vllm_server, work).token_ids) >= 1


def test_waking_up_leaves_a_paused_engine_paused(vllm_server):
    async def work(client):
        await client.pause()
        await client.sleep()
        await client.wake()
        call = asyncio.create_task(client.generate(ask("z")))
        await asyncio.sleep(0.5)
        held = not call.done()
        await client.resume()
        return held, await call

    held, result = run(vllm_server, work)
    assert held and result.token_ids


def test_close_ends_requests_with_abort_and_refuses_later_ones(vllm_server):
    async def work(client):
        call = asyncio.create_task(client.generate(ask("c", max_new_tokens=480, ignore_eos=True)))
        await asyncio.sleep(0.4)
        await client.close()
        await client.close()
        with pytest.raises(EngineError, match="closed"):
            await client.generate(ask("d"))
        return await call

    assert run(vllm_server, work).finish_reason is FinishReason.ABORT


def test_settings_of_the_user_reached_the_server(vllm_server):
    async def work(client):
        return await client._http.get("/server_info?config_format=json")

    config = run(vllm_server, work)["vllm_config"]
    assert config["scheduler_config"]["max_num_seqs"] == 16
    assert config["scheduler_config"]["enable_chunked_prefill"] is False
    assert config["model_config"]["max_model_len"] == CONTEXT
    assert config["model_config"]["logprobs_mode"] == "raw_logprobs"
    assert Path(config["model_config"]["model"]) == vllm_server.model_dir


def test_requests_whose_logprobs_follow_another_convention_are_warned_of_once(vllm_server, caplog):
    async def work(client):
        for temperature in (1.0, 0.5, 0.5):
            await client.generate(ask("t", temperature=temperature, top_p=0.9))

    run(vllm_server, work)
    warnings = [r.getMessage() for r in caplog.records if "log_softmax" in r.getMessage()]
    assert len(warnings) == 1 and "those of temperature 1" in warnings[0]


def test_a_server_that_is_killed_is_gone_for_its_requests(vllm_server):
    """The last one here: whoever needs a server after it starts another."""

    async def work(client):
        calls = [
            asyncio.create_task(client.generate(one))
            for one in several(4, max_new_tokens=480, ignore_eos=True)
        ]
        await asyncio.sleep(0.3)
        vllm_server.process.kill()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(one, EngineGoneError) for one in ended)
        assert not await client.healthy(2.0)
        with pytest.raises(EngineGoneError):
            await client.weight_version()
        await client.abort()

    async def everything():
        client = vllm_server.client()
        await asyncio.wait_for(work(client), 60)
        await client.close()

    asyncio.run(everything())
    assert not vllm_server.process.alive and vllm_server.process.pids == []
