"""vLLM's and OpenAI's forms, by what the engine is asked and what the client gets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
import pytest

from dovetail.types import SamplingParams
from tests.unit.router.scripted import Scripted, serving

GENERATE = "/inference/v1/generate"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


def _ask(path: str, body: dict[str, Any], engine: Scripted | None = None) -> tuple[Any, Scripted]:
    engine = engine or Scripted()

    async def work() -> Any:
        async with serving(engine) as client:
            return await client.ok(path, body)

    return asyncio.run(work()), engine


def _chunks(path: str, body: dict[str, Any], script: str) -> list[dict[str, Any]]:
    text, _ = _ask(path, {**body, "stream": True}, Scripted(script))
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_vllm_gives_ids_logprobs_usage_and_version() -> None:
    body = {
        "model": "some/model",
        "token_ids": [5, 6],
        "sampling_params": {"max_tokens": 2, "logprobs": 1},
        "request_id": "mine",
    }
    answer, engine = _ask(GENERATE, body)
    assert answer["request_id"] == "mine"
    assert answer["weight_version"] == "7"
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    (choice,) = answer["choices"]
    assert choice["token_ids"] == [97, 98]
    assert [one["logprob"] for one in choice["logprobs"]["content"]] == [-0.125, -0.25]
    assert choice["finish_reason"] == "length"
    assert engine.requests[0].prompt_ids == (5, 6)


def test_the_sampling_fields_that_vime_sends_reach_the_engine() -> None:
    params = {
        "max_tokens": 3,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.2,
        "stop": ["z"],
        "include_stop_str_in_output": True,
        "stop_token_ids": [9],
        "seed": 3,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "ignore_eos": True,
    }
    answer, engine = _ask(GENERATE, {"token_ids": [5], "sampling_params": params})
    assert answer["choices"][0]["logprobs"] is None
    assert engine.requests[0].sampling == SamplingParams(
        max_new_tokens=3,
        min_new_tokens=1,
        temperature=0.5,
        top_p=0.9,
        min_p=0.2,
        stop=("z",),
        stop_token_ids=(9,),
        ignore_eos=True,
        seed=3,
    )


def test_vllm_gives_sixteen_tokens_by_default_and_routed_experts_as_npy() -> None:
    engine = Scripted("a" * 20)
    engine.routed_experts = np.ones((2, 1, 1))
    answer, _ = _ask(GENERATE, {"token_ids": [5]}, engine)
    assert len(answer["choices"][0]["token_ids"]) == 16
    packed = base64.b64decode(answer["choices"][0]["routed_experts"])
    assert np.load(io.BytesIO(packed)).tolist() == [[[1]], [[1]]]


def test_completions_of_text_and_ids() -> None:
    body = {"prompt": ["hi", [5, 6, 7]], "max_tokens": 2, "logprobs": 1, "n": 2, "stop": "b"}
    answer, _ = _ask(COMPLETIONS, body)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "some/model"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]][1:3] == [
        [104, 105],
        [5, 6, 7],
    ]
    first = answer["choices"][0]
    assert (first["text"], first["finish_reason"], first["stop_reason"]) == ("a", "stop", "b")
    assert first["token_ids"] == [97, 98]
    assert first["logprobs"]["token_logprobs"] == [-0.125, -0.25]
    assert first["logprobs"]["text_offset"] == [0, 1]
    # A prompt counts once, whatever the number of its choices.
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 8


def test_chat_goes_through_the_chat_template() -> None:
    body = {"messages": HELLO, "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 1}
    answer, engine = _ask(CHAT, body)
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "ab"}
    assert choice["token_ids"] == [97, 98]
    assert [one["token"] for one in choice["logprobs"]["content"]] == ["a", "b"]
    assert bytes(engine.requests[0].prompt_ids).decode() == "u:hi;a:"
    assert answer["prompt_token_ids"] == list(engine.requests[0].prompt_ids)


def test_chat_without_a_limit_has_the_rest_of_the_context() -> None:
    _, engine = _ask(CHAT, {"messages": HELLO})
    assert engine.requests[0].sampling.max_new_tokens == 64 - len("u:hi;a:")


def test_text_parts_tools_and_a_message_to_go_on_from_reach_the_template() -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "so"}]
    tools = [{"name": "a"}, {"name": "b"}]
    body = {"messages": messages, "tools": tools, "continue_final_message": True}
    _, engine = _ask(CHAT, {**body, "max_tokens": 1})
    assert bytes(engine.requests[0].prompt_ids).decode() == "[2]u:hi;a:so;"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_chunks_of_a_stream_add_up_to_the_answer(path: str) -> None:
    script = "abcdefghijklmnopqrstuvwxyz"
    prompt = {"prompt": "hi"} if path == COMPLETIONS else {"messages": HELLO}
    body = {**prompt, "max_tokens": 20, "stream_options": {"include_usage": True}}
    logprobs: dict[str, Any] = {"logprobs": 1} if path == COMPLETIONS else {"logprobs": True}
    *chunks, last = _chunks(path, {**body, **logprobs}, script)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 20
    choices = [chunk["choices"][0] for chunk in chunks]
    texts = [one["text"] if path == COMPLETIONS else one["delta"]["content"] for one in choices]
    assert "".join(texts) == script[:20]
    assert len(texts) == 2
    assert [token for one in choices for token in one["token_ids"]] == list(range(97, 117))
    assert [one["finish_reason"] for one in choices] == [None, "length"]
    values = [
        value
        for one in choices
        for value in (
            one["logprobs"]["token_logprobs"]
            if path == COMPLETIONS
            else [each["logprob"] for each in one["logprobs"]["content"]]
        )
    ]
    assert values == [-(i + 1) / 8 for i in range(20)]


def test_a_streamed_text_never_takes_a_stop_string_back() -> None:
    script = "abcdefghijklmnopqrstuvwxyz"
    chunks = _chunks(COMPLETIONS, {"prompt": "hi", "max_tokens": 25, "stop": "opq"}, script)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == script[:14]


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        (GENERATE, {}, "token_ids", "one token id or more"),
        (GENERATE, {"token_ids": "hi"}, "token_ids", "a list of token ids"),
        (
            GENERATE,
            {"token_ids": [5], "sampling_params": {"max_new_tokens": 3}},
            "sampling_params.max_new_tokens",
            "'max_tokens'",
        ),
        (
            GENERATE,
            {"token_ids": [5], "sampling_params": {"logprobs": 5}},
            "sampling_params.logprobs",
            "0 or 1",
        ),
        (GENERATE, {"token_ids": [5], "features": {"image": 1}}, "features", "text only"),
        (GENERATE, {"token_ids": [5], "stream": True}, "stream", "in one piece"),
        (COMPLETIONS, {}, "prompt", "text, a list of token ids"),
        (COMPLETIONS, {"prompt": "a", "max_token": 3}, "max_token", "'max_tokens'"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, "echo", "does not repeat prompts"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 99}, "max_new_tokens", "do not fit"),
        (CHAT, {}, "messages", "a list of messages"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0]", "role"),
        (CHAT, {"messages": [{"role": "alien", "content": "x"}]}, "messages", "unknown role alien"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "text only",
        ),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice", "no tool"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json"}}, "response_format", "not"),
    ],
)
def test_a_wrong_field_is_named(path: str, body: dict[str, Any], param: str, said: str) -> None:
    async def work() -> dict[str, Any]:
        async with serving(Scripted()) as client:
            return await client.refused(path, body)

    error = asyncio.run(work())
    assert error["param"] == param
    assert said in error["message"] or said in (error["expected"] or "")
