"""POST /generate: every field, by what the engine is asked and what the client gets."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import numpy as np
import pytest

from dovetail.types import EngineError, SamplingParams
from tests.unit.router.scripted import Scripted, serving


def _generate(body: dict[str, Any], script: str = "abcdefgh") -> tuple[Any, Scripted]:
    """The answer to one request, and the engine that was asked."""
    engine = Scripted(script)

    async def work() -> Any:
        async with serving(engine) as client:
            return await client.ok("/generate", body)

    return asyncio.run(work()), engine


def _refused(body: dict[str, Any], **engine_state: Any) -> dict[str, Any]:
    engine = Scripted()
    vars(engine).update(engine_state)

    async def work() -> dict[str, Any]:
        async with serving(engine) as client:
            return await client.refused("/generate", body)

    return asyncio.run(work())


def _params(**params: Any) -> dict[str, Any]:
    return {"text": "hi", "sampling_params": params, "return_logprob": True}


def test_an_answer_has_everything_that_plugins_read() -> None:
    answer, engine = _generate(_params(max_new_tokens=3) | {"rid": "mine"})
    meta = answer.pop("meta_info")
    assert answer == {"text": "abc", "output_ids": [97, 98, 99]}
    assert meta.pop("e2e_latency") >= 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 3},
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "cached_tokens": 1,
        "weight_version": "7",
        "weight_versions": [{"version": "7", "start": 0, "end": 3}],
        "input_token_logprobs": [],
        "output_token_logprobs": [[-0.125, 97, None], [-0.25, 98, None], [-0.375, 99, None]],
    }
    assert engine.requests[0].prompt_ids == (104, 105)


def test_input_ids_are_taken_as_they_are() -> None:
    answer, engine = _generate({"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}})
    assert engine.requests[0].prompt_ids == (5, 6)
    assert "output_token_logprobs" not in answer["meta_info"]


def test_absent_sampling_fields_have_sglang_defaults() -> None:
    engine = Scripted()

    async def work() -> None:
        async with serving(engine) as client:
            await client.post("/generate", {"text": "hi"})

    asyncio.run(work())
    assert engine.requests[0].sampling == SamplingParams(
        max_new_tokens=128, skip_special_tokens=True
    )


def test_the_sampling_fields_of_a_rollout_reach_the_engine() -> None:
    params = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "max_new_tokens": 4,
        "min_new_tokens": 2,
        "stop": ["x", "yz"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
        "sampling_seed": 11,
        "repetition_penalty": 1.0,
        "custom_params": {"mine": 1},
    }
    _, engine = _generate(_params(**params))
    assert engine.requests[0].sampling == SamplingParams(
        max_new_tokens=4,
        min_new_tokens=2,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        stop=("x", "yz"),
        stop_token_ids=(9,),
        ignore_eos=True,
        skip_special_tokens=False,
        seed=11,
    )


def test_null_max_new_tokens_is_the_room_that_the_context_has() -> None:
    _, engine = _generate(_params(max_new_tokens=None))
    assert engine.requests[0].sampling.max_new_tokens == 62


@pytest.mark.parametrize(
    ("params", "text", "matched"),
    [
        ({"stop": "cd"}, "ab", "cd"),
        ({"stop": ["f", "cd"], "no_stop_trim": True}, "abcd", "cd"),
        ({"stop_token_ids": [99]}, "ab", 99),
        ({"stop_token_ids": [99], "no_stop_trim": True}, "abc", 99),
    ],
)
def test_what_ended_the_answer_is_named_and_trimmed(
    params: dict[str, Any], text: str, matched: Any
) -> None:
    answer, _ = _generate(_params(**params, max_new_tokens=8))
    assert answer["text"] == text
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}
    # Tokens are what was sampled, the one that stopped included.
    assert answer["output_ids"][-1] == (100 if matched == "cd" else 99)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "ab"),
        ({"no_stop_trim": True}, "ab"),
        ({"no_stop_trim": True, "skip_special_tokens": False}, "ab<eos>"),
        ({"skip_special_tokens": False}, "ab"),
        ({"ignore_eos": True, "max_new_tokens": 5}, "abcd"),
    ],
)
def test_special_tokens_in_the_text(params: dict[str, Any], text: str) -> None:
    script = "ab$cd" if "ignore_eos" in params else "ab$"
    answer, _ = _generate(_params(**{"max_new_tokens": 8, **params}), script)
    assert answer["text"] == text


def test_a_batch_is_answered_in_order() -> None:
    body = {"input_ids": [[5], [6, 7]], "sampling_params": {"max_new_tokens": 1}, "rid": ["a", "b"]}
    answers, _ = _generate(body)
    assert [one["meta_info"]["prompt_tokens"] for one in answers] == [1, 2]
    assert [one["meta_info"]["id"] for one in answers] == ["a", "b"]


def test_a_batch_may_have_sampling_params_each() -> None:
    params = [{"max_new_tokens": 1}, {"max_new_tokens": 2}]
    answers, _ = _generate({"text": ["x", "y"], "sampling_params": params})
    assert [one["text"] for one in answers] == ["a", "ab"]


def test_several_choices_have_seeds_and_names_of_their_own() -> None:
    body = _params(max_new_tokens=1, n=3, sampling_seed=40) | {"rid": "r"}
    answers, engine = _generate(body)
    assert [one["meta_info"]["id"] for one in answers] == ["r_0", "r_1", "r_2"]
    assert sorted(one.sampling.seed or 0 for one in engine.requests) == [40, 41, 42]


def test_token_texts_on_wish() -> None:
    body = _params(max_new_tokens=2) | {"return_text_in_logprobs": True}
    answer, _ = _generate(body)
    assert answer["meta_info"]["output_token_logprobs"] == [[-0.125, 97, "a"], [-0.25, 98, "b"]]


def test_a_stream_is_cumulative_and_ends_with_done() -> None:
    engine = Scripted("abcdefghijklmnopqrstuvwxyz" * 2)

    async def work() -> str:
        async with serving(engine) as client:
            body = _params(max_new_tokens=40) | {"stream": True}
            return str(await client.ok("/generate", body))

    lines = [line.removeprefix("data: ") for line in asyncio.run(work()).split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert [len(chunk["output_ids"]) for chunk in chunks] == [16, 40]
    assert chunks[1]["text"].startswith(chunks[0]["text"])
    assert [chunk["meta_info"]["finish_reason"] for chunk in chunks] == [
        None,
        {"type": "length", "length": 40},
    ]
    logprobs = [one[0] for one in chunks[1]["meta_info"]["output_token_logprobs"]]
    assert logprobs == [-(i + 1) / 8 for i in range(40)]
    assert chunks[1]["meta_info"]["prompt_tokens"] == 2
    assert chunks[1]["meta_info"]["weight_versions"] == [{"version": "7", "start": 0, "end": 40}]
    # The second piece goes on from the first: seeds and minima count from the response's start.
    assert [(len(r.prompt_ids), r.num_generated) for r in engine.requests] == [(2, 0), (18, 16)]


def test_a_stream_shows_no_half_of_a_stop_string() -> None:
    script = "abcdefghijklmnopqrstuvwxyz"

    async def work() -> str:
        async with serving(Scripted(script)) as client:
            params = {"max_new_tokens": 30, "stop": "pq"}
            return str(await client.ok("/generate", _params(**params) | {"stream": True}))

    chunks = [json.loads(line[6:]) for line in asyncio.run(work()).split("\n\n")[:-2]]
    assert [chunk["text"] for chunk in chunks] == [script[:15], script[:15]]
    assert chunks[1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": "pq"}


def test_chunks_of_a_streamed_batch_have_their_number() -> None:
    async def work() -> str:
        async with serving(Scripted()) as client:
            body = {"text": ["x", "y"], "stream": True, "sampling_params": {"max_new_tokens": 2}}
            return str(await client.ok("/generate", body))

    chunks = [json.loads(line[6:]) for line in asyncio.run(work()).split("\n\n")[:-2]]
    assert sorted(chunk["index"] for chunk in chunks) == [0, 1]


def test_an_aborted_request_gives_what_there_is() -> None:
    engine = Scripted()

    async def work() -> Any:
        engine.held = asyncio.Event()
        async with serving(engine) as client:
            body = _params(max_new_tokens=8) | {"rid": "mine"}
            waiting = asyncio.ensure_future(client.ok("/generate", body))
            await client.until(1)
            assert await client.ok("/abort_request", {"rid": "other"}) == {
                "success": True,
                "aborted": 0,
            }
            assert not waiting.done()
            assert (await client.ok("/abort_request", {"rid": "mine"}))["aborted"] == 1
            return await waiting

    answer = asyncio.run(work())
    assert answer["output_ids"] == [97, 98]
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"


def test_routed_experts_are_int32_in_base64() -> None:
    engine = Scripted()
    engine.routed_experts = np.arange(12, dtype=np.int64).reshape(3, 2, 2)

    async def work() -> Any:
        async with serving(engine) as client:
            body = _params(max_new_tokens=2) | {"return_routed_experts": True}
            return await client.ok("/generate", body)

    meta = asyncio.run(work())["meta_info"]
    packed = base64.b64decode(meta["routed_experts"])
    assert np.frombuffer(packed, dtype=np.int32).tolist() == list(range(12))
    assert meta["routed_experts_shape"] == [3, 2, 2]
    assert engine.requests[0].return_routed_experts


@pytest.mark.parametrize("stream", [False, True])
def test_the_session_that_a_header_names_goes_on_to_the_engines(stream: bool) -> None:
    engine = Scripted("a" * 40)

    async def work() -> None:
        async with serving(engine) as client:
            headers = {"X-SMG-Routing-Key": "session"}
            body = _params(max_new_tokens=40) | {"stream": stream}
            assert (await client.post("/generate", body, headers=headers))[0] == 200

    asyncio.run(work())
    assert len(engine.requests) == 1 + stream
    assert {request.session_id for request in engine.requests} == {"session"}


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input_ids", "exactly one of text and input_ids"),
        ({"text": "a", "input_ids": [1]}, "input_ids", "both"),
        ({"text": 3}, "text", "a string or a list of strings"),
        ({"text": ""}, "text", "one token or more"),
        ({"input_ids": [[1], []]}, "input_ids", "one token or more"),
        ({"input_ids": [1, "x"]}, "input_ids", "a list of token ids"),
        ({"input_ids": [-1]}, "input_ids", "a list of token ids"),
        ({"input_ids": [300]}, "prompt", "ids from 0 to 255"),
        ({"text": "a", "sampling_params": 3}, "sampling_params", "a JSON object"),
        (_params(max_new_token=3), "sampling_params.max_new_token", "'max_new_tokens'"),
        (_params(temperature=-1), "sampling_params.temperature", "a number >= 0.0"),
        (_params(temperature="hot"), "sampling_params.temperature", "a number"),
        (_params(top_p=0), "sampling_params.top_p", "above 0"),
        (_params(top_k=0), "sampling_params.top_k", "-1 for all"),
        (_params(max_new_tokens=2.5), "sampling_params.max_new_tokens", "a whole number"),
        (_params(max_new_tokens=True), "sampling_params.max_new_tokens", "a whole number"),
        (_params(stop=[""]), "sampling_params.stop", "none of them empty"),
        (_params(ignore_eos=1), "sampling_params.ignore_eos", "true or false"),
        (_params(n=0), "sampling_params.n", "from 1 to 256"),
        (_params(frequency_penalty=0.5), "sampling_params.frequency_penalty", "no penalties"),
        (_params(json_schema="{}"), "sampling_params.json_schema", "does not constrain"),
        (_params(max_new_tokens=100), "max_new_tokens", "do not fit 64"),
        ({"text": "a", "image_data": ["data:"]}, "image_data", "takes text only"),
        ({"text": "a", "lora_path": "x"}, "lora_path", "one set of weights"),
        (_params() | {"logprob_start_len": 0}, "logprob_start_len", "the sampled tokens' logprobs"),
        (_params() | {"top_logprobs_num": 2}, "top_logprobs_num", "the sampled tokens' logprobs"),
        (_params() | {"logprob_start_len": 3}, "logprob_start_len", "a token of the prompt's 2"),
        (_params() | {"logprob_start_len": [0, 0]}, "logprob_start_len", "each of the 1 prompts"),
        (_params() | {"top_logprobs_num": -1}, "top_logprobs_num", "from 0 to 256"),
        (_params() | {"return_logprob": 1}, "return_logprob", "true or false"),
        (_params() | {"return_logprobs": True}, "return_logprobs", "'return_logprob'"),
        (_params() | {"rid": ["a", "b"]}, "rid", "one for each of the 1 prompts"),
        (
            _params(max_new_tokens=1) | {"return_routed_experts": True},
            "return_routed_experts",
            "False",
        ),
    ],
)
def test_a_wrong_field_is_named_with_what_came_and_what_is_expected(
    body: dict[str, Any], param: str, said: str
) -> None:
    error = _refused(body)
    assert error["param"] == param
    assert said in error["message"] or said in (error["expected"] or "")
    assert error["code"] == 400
    assert error["got"] is not None


def test_an_engine_that_fails_is_a_500_with_its_message() -> None:
    engine = Scripted()
    engine.failure = EngineError("out of memory")

    async def work() -> dict[str, Any]:
        async with serving(engine) as client:
            return await client.refused("/generate", _params(), 500)

    assert asyncio.run(work())["message"] == "the engine failed: out of memory"
