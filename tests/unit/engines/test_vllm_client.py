"""The client of vLLM against a server that does what a healthy one does not."""

import asyncio
import base64
import io
import subprocess
import sys

import numpy as np
import pytest
from aiohttp import web

from dovetail.engines.launch import ClientSettings
from dovetail.engines.vllm.client import make_client
from dovetail.engines.vllm.wire import wire_seed
from dovetail.types.calls import FinishReason, GenerateRequest, SamplingParams, ScoreRequest
from dovetail.types.errors import EngineBusyError, EngineError, EngineGoneError, RequestTooLongError
from dovetail.types.media import Media
from tests.unit.engines.tiny import CharTokenizer
from tests.unit.engines.vllm_protocol import GENERATE, answer, ask, error, generate, never, run


def sent(request, **settings):
    """The sampling parameters that the server saw."""

    async def work(client, server):
        server.answers[GENERATE] = answer([8, 9])
        await client.generate(request)
        (_, body), *_ = [one for one in server.asked if one[0] == GENERATE]
        assert body["token_ids"] == list(request.prompt_ids)
        return body["sampling_params"]

    return run(work, **settings)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def test_an_answer_becomes_a_result():
    result = generate(answer([8, 9], version="3", reason="length"), tokenizer=CharTokenizer())
    assert result.token_ids == [8, 9] and result.logprobs == [-0.5, -0.5]
    assert result.finish_reason is FinishReason.LENGTH and result.text == "$%"
    assert [(s.weight_version, s.start, s.end) for s in result.version_spans] == [(3, 0, 2)]
    assert (result.prompt_tokens, result.cached_tokens) == (3, 2)
    assert result.routed_experts is None


def test_sampling_parameters_are_written_as_vllm_reads_them():
    params = sent(
        ask(
            temperature=0.7,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            min_new_tokens=2,
            stop_token_ids=(9, 4),
            seed=11,
        ),
        eos_token_ids=(2, 4),
    )
    assert params == {
        "max_tokens": 4,
        "min_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "stop_token_ids": [2, 4, 9],
        "ignore_eos": False,
        "logprobs": 0,
        "detokenize": False,
        "skip_special_tokens": False,
        "seed": 11,
    }
    endless = sent(ask(ignore_eos=True, stop=("ab",)), eos_token_ids=(2,))
    assert endless["stop_token_ids"] == [] and "seed" not in endless
    assert endless["detokenize"] and endless["include_stop_str_in_output"]
    assert endless["stop"] == ["ab"]


def test_tokens_of_an_earlier_part_count_for_the_least_length_and_change_the_seed():
    first = sent(ask(min_new_tokens=10, seed=3, max_new_tokens=20))
    rest = sent(ask(min_new_tokens=10, seed=3, max_new_tokens=20, num_generated=2))
    last = sent(ask(min_new_tokens=10, seed=3, max_new_tokens=5))
    assert [p["min_tokens"] for p in (first, rest, last)] == [10, 8, 5]
    assert first["seed"] == 3 and rest["seed"] == wire_seed(3, 2) != 3


def test_seeds_of_continuations_do_not_meet_and_fit_into_vllms_field():
    seeds = {wire_seed(seed, n) for seed in range(200) for n in range(200)}
    assert len(seeds) == 200 * 199 + 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert wire_seed(2**64 - 1, 0) < 2**63


def test_nothing_is_asked_for_no_new_tokens():
    async def work(client, server):
        result = await client.generate(ask(max_new_tokens=0))
        return result, server.asked

    result, asked = run(work)
    assert (result.token_ids, result.finish_reason, asked) == ([], FinishReason.LENGTH, [])


def test_a_stop_string_that_begins_in_an_earlier_part_ends_the_response():
    text = CharTokenizer().encode("xab")
    reply = answer(CharTokenizer().encode("cdefgh"), version="2")
    experts = np.arange(8 * 2 * 2).reshape(8, 2, 2)
    reply["choices"][0]["routed_experts"] = npy(experts)
    request = ask("s", text, 2, stop=("zz", "abcd"), return_routed_experts=True)
    result = generate(reply, request, tokenizer=CharTokenizer())
    assert result.text == "cd" and result.finish_reason is FinishReason.STOP
    assert len(result.logprobs) == 2
    assert [(s.start, s.end) for s in result.version_spans] == [(0, 2)]
    assert np.array_equal(result.routed_experts, experts[:4])
    whole = generate(reply, ask("s", text, 2, stop=("abX",)), tokenizer=CharTokenizer())
    assert whole.text == "cdefgh"


def test_routed_experts_are_whole_numbers_for_every_token_but_the_last():
    reply = answer([8, 9])
    experts = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2)
    reply["choices"][0]["routed_experts"] = npy(experts)
    result = generate(reply, ask(return_routed_experts=True))
    assert result.routed_experts.dtype == np.int32
    assert np.array_equal(result.routed_experts, experts)
    reply["choices"][0]["routed_experts"] = npy(experts[:-1])
    with pytest.raises(EngineGoneError, match="routed_experts"):
        generate(reply, ask(return_routed_experts=True))
    with pytest.raises(EngineError, match="--enable-return-routed-experts"):
        generate(answer([8, 9]), ask(return_routed_experts=True))
    aborted = answer([], reason="abort")
    assert generate(aborted, ask(return_routed_experts=True)).routed_experts is None


def test_objects_in_place_of_experts_are_not_unpickled():
    reply = answer([8, 9])
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    reply["choices"][0]["routed_experts"] = base64.b64encode(file.getvalue()).decode()
    with pytest.raises(EngineGoneError, match="pickle"):
        generate(reply, ask(return_routed_experts=True))


@pytest.mark.parametrize(
    "damage",
    [
        {"token_ids": None},
        {"token_ids": ["a", "b"]},
        {"logprobs": None},
        {"logprobs": {"content": [{"logprob": -0.1}]}},
        {"finish_reason": "tired"},
        {"weight_versions": [{"version": "1", "start": 0, "end": 1}]},
        {"weight_versions": [{"version": "1", "start": 1, "end": 2}]},
        {"weight_versions": "1"},
    ],
)
def test_an_answer_that_is_none_of_vllms_is_another_engines_matter(damage):
    with pytest.raises(EngineGoneError, match="'r'"):
        generate(answer([8, 9], **damage))


@pytest.mark.parametrize("body", [[], {}, {"choices": []}, {"choices": [{}]}, "text", 5])
def test_json_of_another_shape_is_too(body):
    with pytest.raises(EngineGoneError):
        generate(web.json_response(body))


def test_figures_that_are_not_finite_are_named_instead_of_trained_on():
    reply = answer([8, 9], version="4")
    reply["choices"][0]["logprobs"]["content"][1]["logprob"] = -9999.0
    with pytest.raises(EngineError, match="not finite; weights of version 4") as caught:
        generate(reply)
    assert not isinstance(caught.value, EngineGoneError)


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (error("no such thing", 400), EngineError, "no such thing"),
        (error("This model's maximum context length is 9 tokens", 400), RequestTooLongError, "9"),
        (error("EngineCore encountered an issue", 500), EngineGoneError, "EngineCore"),
        (error("Forbidden", 403), EngineError, "--enable-scale-out"),
        (error("Not Found", 404), EngineError, "VLLM_SERVER_DEV_MODE"),
        (error("later", 503), EngineBusyError, "later"),
        (web.Response(text="<html>"), EngineGoneError, "not JSON"),
        (web.Response(status=502, text="bad gateway"), EngineGoneError, "502"),
    ],
)
def test_what_a_server_refuses_is_told_from_what_another_one_may_do(reply, kind, words):
    with pytest.raises(kind, match=words) as caught:
        generate(reply)
    assert isinstance(caught.value, EngineGoneError) == (kind is EngineGoneError)


def test_a_server_that_breaks_off_or_never_answers_is_gone():
    async def cut(body):
        raise asyncio.CancelledError

    with pytest.raises(EngineGoneError):
        generate(cut)
    with pytest.raises(EngineGoneError, match=r"no answer within 0\.3 s"):
        generate(never, request_timeout_s=0.3)


def test_what_can_never_fit_or_is_malformed_is_refused_before_it_is_sent():
    async def work(client, server):
        with pytest.raises(RequestTooLongError, match=r"3 prompt tokens.*= 64 tokens.*60"):
            await client.generate(ask(max_new_tokens=61))
        for bad in [ask("x", ()), ask("x", (101,)), ask("x", (-1,)), ask("x", (5,), 2)]:
            with pytest.raises(EngineError, match="'x'"):
                await client.generate(bad)
        images = GenerateRequest("x", (5,), SamplingParams(), media=Media({}, "k"))
        with pytest.raises(EngineError, match="--rollout-engine embedded"):
            await client.generate(images)
        for start, top, temperature in [(0, 0, 1.0), (4, 0, 1.0), (1, -1, 1.0), (1, 0, 0.0)]:
            with pytest.raises(EngineError, match="'x'"):
                await client.score(ScoreRequest("x", (5, 6, 7), start, temperature, top))
        with pytest.raises(RequestTooLongError, match="60"):
            await client.score(ScoreRequest("x", (5,) * 60))
        assert server.asked == []

    run(work, max_context_len=60)


def test_rescaling_a_score_is_refused_where_it_would_be_too_much():
    async def work(client, server):
        with pytest.raises(EngineError, match="at temperature 1 only"):
            await client.score(ScoreRequest("x", (5,) * 60, temperature=0.5))

    run(work, vocab_size=150_000)


def test_a_score_reads_its_places_and_version():
    def place(**ids):
        return {k.removeprefix("t"): {"logprob": v, "rank": 1} for k, v in ids.items()}

    reply = answer([1], version="6")
    reply["prompt_logprobs"] = [None, place(t6=-1.0, t8=-0.5), place(t7=-2.0, t9=-0.1)]

    async def work(client, server):
        server.answers[GENERATE] = reply
        whole = await client.score(ScoreRequest("s", (5, 6, 7), 1, 1.0, 2))
        server.answers[GENERATE] = {**reply, "prompt_logprobs": [None]}
        with pytest.raises(EngineGoneError):
            await client.score(ScoreRequest("s", (5, 6, 7)))
        return whole

    result = run(work)
    assert result.logprobs == [-1.0, -2.0] and result.weight_version == 6
    assert result.top == [[(8, -0.5), (6, -1.0)], [(9, -0.1), (7, -2.0)]]


def test_an_abort_is_repeated_until_the_server_knows_the_request():
    async def work(client, server):
        ended = asyncio.Event()
        aborts = []

        async def slowly(body):
            await ended.wait()
            return answer([8], reason="abort", version="2")

        async def abort(body):
            aborts.append(body["request_ids"])
            if len(aborts) == 3:
                ended.set()
            return {"status": "aborted"}

        server.answers.update({GENERATE: slowly, "/abort_requests": abort})
        calls = [asyncio.create_task(client.generate(ask(name))) for name in ("a", "b")]
        while len(server.asked) < 2:
            await asyncio.sleep(0.01)
        wire_ids = {body["request_id"] for _, body in server.asked}
        await client.abort(["nobody"])
        assert aborts == []
        await client.abort()
        assert {one.removeprefix("generate-tokens-") for one in aborts[0]} == wire_ids
        return await asyncio.gather(*calls), len(aborts)

    results, times = run(work)
    assert [r.finish_reason for r in results] == [FinishReason.ABORT] * 2
    assert [r.token_ids for r in results] == [[8], [8]] and times >= 3


def test_health_never_raises():
    async def work(client, server):
        good = await client.healthy(5.0)
        server.answers["/health"] = error("EngineCore is dead", 503)
        dead = await client.healthy(5.0)
        server.answers["/health"] = never
        return good, dead, await client.healthy(0.2)

    assert run(work) == (True, False, False)
    nobody = make_client("http://127.0.0.1:9", ClientSettings(64))

    async def look():
        found = await nobody.healthy(1.0)
        await nobody.close()
        return found

    assert asyncio.run(look()) is False


def test_a_token_goes_with_every_request_and_into_no_message():
    seen = []

    async def work(client, server):
        async def look(body):
            return error("who are you, s3cret?", 401)

        server.answers[GENERATE] = look
        with pytest.raises(EngineError) as caught:
            await client.generate(ask())
        seen.append(str(caught.value))

    run(work, token="s3cret")
    assert "s3cret" not in seen[0]


@pytest.mark.parametrize(
    ("mode", "sampling", "words"),
    [
        ("raw_logprobs", {"temperature": 1.0, "top_p": 0.5}, None),
        ("raw_logprobs", {"temperature": 0.5}, "those of temperature 1"),
        ("processed_logprobs", {"temperature": 0.5}, None),
        ("processed_logprobs", {"temperature": 1.0, "top_k": 5}, "after top_p, top_k and min_p"),
        ("raw_logits", {"temperature": 0.5}, "raw_logits"),
    ],
)
def test_logprobs_of_another_convention_are_told_once(caplog, mode, sampling, words):
    async def work(client, server):
        server.answers[GENERATE] = answer([8])
        config = {"model_config": {"logprobs_mode": mode}}
        server.answers["/server_info"] = {"vllm_config": config}
        for _ in range(3):
            await client.generate(ask(**sampling))
        return sum(path.startswith("/server_info") for path in server.paths())

    assert run(work) == 1
    told = [r.getMessage() for r in caplog.records if "log_softmax" in r.getMessage()]
    assert len(told) == (words is not None)
    assert words is None or words in told[0]


def test_a_closed_client_refuses():
    async def work(client, server):
        await client.close()
        with pytest.raises(EngineError, match="closed"):
            await client.generate(ask())

    run(work)


def test_client_and_launcher_import_without_torch_or_vllm():
    code = (
        "import sys, dovetail.engines.vllm.client, dovetail.engines.vllm.launch;"
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
