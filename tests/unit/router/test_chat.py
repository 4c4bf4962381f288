"""Chat as agents need it: calls of tools, thoughts, and logprobs beside the sampled tokens' own."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from dovetail.router.tool_calls import parse_model_output
from tests.unit.router.scripted import Scoring, Scripted, serving

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "1?"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>'


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.router.scripted.CONTEXT", 400)


def _ask(body: dict[str, Any], engine: Scripted, path: str = CHAT) -> Any:
    async def work() -> Any:
        async with serving(engine) as client:
            return await client.ok(path, body)

    return asyncio.run(work())


def _chunks(body: dict[str, Any], engine: Scripted) -> list[dict[str, Any]]:
    text = _ask({**body, "stream": True}, engine)
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_calls_of_tools_are_taken_out_of_the_text() -> None:
    body = {"messages": HELLO, "tools": TOOLS, "max_tokens": 200}
    (choice,) = _ask(body, Scripted(f"Well.\n{CALL}$"))["choices"]
    message = choice["message"]
    assert message["content"] == "Well."
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert choice["finish_reason"] == "tool_calls"
    # Whatever the text became: these are the tokens.
    assert "".join(chr(i) for i in choice["token_ids"][:-1]) == f"Well.\n{CALL}"


def test_a_message_of_calls_alone_has_no_content() -> None:
    body = {"messages": HELLO, "tools": TOOLS, "max_tokens": 200}
    (choice,) = _ask(body, Scripted(f"{CALL}$"))["choices"]
    assert choice["message"]["content"] is None
    assert len(choice["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ("f", "tools"),
        (["f"], "tools"),
        ([{}], "tools[0].name"),
        ([*TOOLS, {"function": 3}], "tools[1].function"),
        ([{"function": None, "name": "f"}], "tools[0].function"),
        ([{"function": {"name": 3}}], "tools[0].function.name"),
        ([{"function": {"name": "f", "parameters": [1]}}], "tools[0].function.parameters"),
        ([{"name": "f", "parameters": {"properties": 3}}], "tools[0].parameters.properties"),
    ],
)
def test_malformed_tools_are_named(tools: Any, field: str) -> None:
    async def work() -> None:
        async with serving(Scripted("a$")) as client:
            error = await client.refused(CHAT, {"messages": HELLO, "tools": tools})
            assert error["param"] == field

    asyncio.run(work())


@pytest.mark.parametrize(
    ("kind", "value"), [("integer", 3), (["integer", "null"], 3), ("string", "3"), (None, "3")]
)
def test_arguments_that_are_no_json_are_of_the_declared_kind(kind: Any, value: Any) -> None:
    parameters = {"properties": {"a": {"type": kind}}}
    tools = [{"function": {"name": "f", "parameters": parameters}}]
    said = "<tool_call><function=f><parameter=a>3</parameter></function></tool_call>"
    body = {"messages": HELLO, "tools": tools, "max_tokens": 200}
    (choice,) = _ask(body, Scripted(f"{said}$"))["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": value}


def test_a_model_that_writes_a_thousand_brackets_called_nothing() -> None:
    said = "<tool_call>" + "[" * 5000 + "</tool_call>"
    assert parse_model_output(said, tools=TOOLS).text == said


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_the_text_is_left_as_it_is(more: dict[str, Any]) -> None:
    body = {"messages": HELLO, "max_tokens": 200, **more}
    (choice,) = _ask(body, Scripted(f"{CALL}$"))["choices"]
    assert choice["message"] == {"role": "assistant", "content": CALL}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"Let me see, this takes a while.\n{CALL}{CALL}", "Let me see, this takes a while.", 2),
        ("1 <tool_calm> and <tool", "1 <tool_calm> and <tool", 0),
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", 0),
        (CALL, "", 1),
    ],
)
def test_a_stream_tells_calls_once_they_are_whole(text: str, content: str, calls: int) -> None:
    body = {"messages": HELLO, "tools": TOOLS, "max_tokens": 200}
    chunks = _chunks(body, Scripted(f"{text}$"))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == content
    told = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in told] == list(range(calls))
    assert all(json.loads(call["function"]["arguments"]) == {"a": 1} for call in told)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == ("tool_calls" if calls else "stop")
    assert set(reasons[:-1]) <= {None}
    tokens = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
    assert "".join(map(chr, tokens[:-1])) == text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_thoughts_stay_in_the_content_unless_asked_for(asked: bool, stream: bool) -> None:
    body = {"messages": HELLO, "max_tokens": 200, "separate_reasoning": asked}
    engine = Scripted("<think>one and one make two</think>2$")
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in _chunks(body, engine)]
        content = "".join(delta.get("content") or "" for delta in deltas)
        thoughts = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    else:
        message = _ask(body, engine)["choices"][0]["message"]
        content, thoughts = message["content"], message.get("reasoning_content", "")
    if asked:
        assert (content, thoughts) == ("2", "one and one make two")
    else:
        assert (content, thoughts) == ("<think>one and one make two</think>2", "")


def test_calls_in_messages_reach_the_template_as_objects() -> None:
    seen: list[Any] = []

    def template(self: Any, conversation: Any, **kwargs: Any) -> list[int]:
        seen.extend(conversation)
        return [5]

    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.unit.router.scripted.Letters.apply_chat_template", template)
        _ask({"messages": messages}, Scripted("a$"))
    assert seen[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_the_most_probable_tokens_stand_beside_the_sampled_ones() -> None:
    engine = Scoring("ab$")
    body = {"messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    body |= {"temperature": 0.5, "return_tokens_as_token_ids": True}
    (choice,) = _ask(body, engine)["choices"]
    first = choice["logprobs"]["content"][0]
    start = engine.scored[0].start
    assert (first["token"], first["logprob"]) == ("token_id:97", -0.125)
    assert [(one["token"], one["logprob"]) for one in first["top_logprobs"]] == [
        (f"token_id:{start}", -1.0),
        (f"token_id:{start + 1}", -2.0),
    ]
    assert (engine.scored[0].temperature, engine.scored[0].top) == (0.5, 2)


def test_completions_have_alternatives_from_two_on() -> None:
    engine = Scoring("ab$")
    body = {"prompt": [5, 6], "max_tokens": 1, "logprobs": 2}
    told = _ask(body, engine, "/v1/completions")["choices"][0]["logprobs"]
    assert told["top_logprobs"] == [{"\x02": -1.0, "\x03": -2.0}]
    engine.scored.clear()
    told = _ask({**body, "logprobs": 1}, engine, "/v1/completions")["choices"][0]["logprobs"]
    assert told["top_logprobs"] is None
    assert engine.scored == []


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/inference/v1/generate"])
def test_the_logprobs_of_a_prompt(path: str) -> None:
    engine = Scoring("ab$")
    body: dict[str, Any] = {"max_tokens": 1, "prompt_logprobs": 1}
    if path == CHAT:
        answer = _ask({"messages": HELLO, **body}, engine)
        ids, told = answer["prompt_token_ids"], answer["prompt_logprobs"]
    elif path == "/v1/completions":
        (choice,) = _ask({"prompt": [7, 1, 9], **body}, engine, path)["choices"]
        ids, told = choice["prompt_token_ids"], choice["prompt_logprobs"]
    else:
        answer = _ask({"token_ids": [7, 1, 9], "sampling_params": body}, engine, path)
        ids, told = [7, 1, 9], answer["prompt_logprobs"]
    assert told[0] is None and len(told) == len(ids)
    for place in range(1, len(ids)):
        own = told[place][str(ids[place])]
        assert own["logprob"] == -place / 16
        # The engine of this test finds token `place` the most probable one there.
        assert own["rank"] == (1 if ids[place] == place else None)
        assert told[place][str(place)]["rank"] == 1


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logprobs": True, "top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_an_engine_that_can_not_look_again_says_so(more: dict[str, Any], param: str) -> None:
    async def work() -> dict[str, Any]:
        async with serving(Scripted()) as client:
            return await client.refused(CHAT, {"messages": HELLO, **more})

    error = asyncio.run(work())
    assert error["param"] == param
    assert "sampled tokens' logprobs only" in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("guided_regex", "a+"),
        ("response_format", {"type": "json_object"}),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_what_the_engine_can_not_do_is_refused_by_name(field: str, value: Any) -> None:
    async def work() -> dict[str, Any]:
        async with serving(Scripted()) as client:
            return await client.refused(CHAT, {"messages": HELLO, field: value})

    assert asyncio.run(work())["param"] == field
