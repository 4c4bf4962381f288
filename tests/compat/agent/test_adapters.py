"""Agents' protocols over real sockets: what they get, what the router is asked, what is trained."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from dovetail.compat.agent.adapters import AnthropicAdapter, OpenAIAdapter
from dovetail.compat.agent.adapters.common import flatten_content, sid_from_bearer
from dovetail.compat.agent.aiohttp_threaded import (
    AppHandle,
    FilteredAccessLogger,
    run_app_in_thread,
)
from dovetail.types import Sample
from tests.compat.agent.engine import Engine, Letters

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "look", "arguments": {"at": "sky"}}</tool_call>$'


class Served:
    """An adapter with its engine."""

    def __init__(self, kind: type, engine: Engine, **options: Any) -> None:
        self.engine = engine
        self.adapter = kind(tokenizer=Letters(), sglang_url=engine.url, **options)
        self.handle: AppHandle = run_app_in_thread(
            self.adapter.app,
            thread_name="adapter",
            runner_kwargs={"handler_cancellation": True, "access_log_class": FilteredAccessLogger},
        )
        self.url = f"http://127.0.0.1:{self.handle.port}"

    async def post(self, path: str, body: Any, key: str = "s") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        async with (
            aiohttp.ClientSession() as client,
            client.post(self.url + path, json=body, headers=headers) as answer,
        ):
            text = await answer.text()
            return answer.status, text if "event-stream" in answer.content_type else json.loads(
                text
            )


@pytest.fixture
def servers() -> Iterator[list[Served]]:
    started: list[Served] = []
    yield started
    for served in started:
        served.handle.stop()
        served.engine.handle.stop()


def _text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def _trained(sample: Sample) -> str:
    pairs = zip(sample.response, sample.loss_mask or [], strict=True)
    return "".join(letter for letter, mask in pairs if mask)


def test_a_chat_with_a_tool_becomes_one_sample_token_by_token(servers: list[Served]) -> None:
    served = Served(OpenAIAdapter, Engine(CALL, "blue$"), tool_parser="qwen25")
    servers.append(served)

    async def talk() -> tuple[dict, dict, list[Sample]]:
        served.adapter.open_session(
            "s", sampling_defaults={"temperature": 0.7, "max_new_tokens": 40, "top_k": -1}
        )
        messages: list[dict] = [{"role": "user", "content": [{"type": "text", "text": "colour?"}]}]
        body = {"model": "m", "messages": messages, "tools": TOOLS, "temperature": 0.5}
        _, first = await served.post("/v1/chat/completions", body)
        answer = first["choices"][0]["message"]
        messages += [answer, {"role": "tool", "tool_call_id": "1", "content": "blue sky"}]
        _, second = await served.post("/v1/chat/completions", {**body, "max_tokens": 9})
        samples = await served.adapter.finish_session(
            "s", base_sample=Sample(index=4, metadata={"a": 1}), reward=2.0, extra_metadata={"b": 2}
        )
        return first, second, samples

    first, second, (sample,) = asyncio.run(talk())
    choice = first["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {
        "name": "look",
        "arguments": '{"at": "sky"}',
    }
    assert second["choices"][0]["message"] == {"role": "assistant", "content": "blue"}
    asked = served.engine.requests
    assert _text(asked[0]["input_ids"]) == "[look]u:colour?$a:"
    assert asked[0]["sampling_params"] == {
        "temperature": 0.5,
        "top_k": -1,
        "max_new_tokens": 40,
        "no_stop_trim": True,
    }
    assert asked[1]["sampling_params"]["max_new_tokens"] == 9
    assert asked[0]["return_logprob"] is True and served.engine.keys == ["s", "s"]
    assert _text(sample.tokens) == f"[look]u:colour?$a:{CALL}t:blue sky$a:blue$"
    assert _trained(sample) == CALL + "blue$"
    assert sample.rollout_log_probs is not None and sample.rollout_log_probs[1] == -0.25
    assert sample.reward == 2.0 and sample.weight_versions == ["3", "3"]
    assert sample.metadata == {"a": 1, "b": 2, "truncated": False, "use_tool": True}
    assert second["usage"]["completion_tokens"] == 5


def test_messages_with_a_tool_become_one_sample_token_by_token(servers: list[Served]) -> None:
    served = Served(AnthropicAdapter, Engine(CALL, "blue$"))
    servers.append(served)
    tools = [{"name": "look", "description": "d", "input_schema": {"type": "object"}}]

    async def talk() -> tuple[dict, dict, list[Sample]]:
        served.adapter.open_session("s")
        messages: list[dict] = [{"role": "user", "content": "colour?"}]
        body = {"model": "m", "max_tokens": 50, "messages": messages, "tools": tools}
        body["system"] = [{"type": "text", "text": "be brief"}]
        _, first = await served.post("/v1/messages", body)
        result = {
            "type": "tool_result",
            "tool_use_id": first["content"][0]["id"],
            "content": [{"type": "text", "text": "blue sky"}],
        }
        messages += [
            {"role": "assistant", "content": first["content"]},
            {"role": "user", "content": [result]},
        ]
        _, second = await served.post("/v1/messages?beta=true", body)
        return (
            first,
            second,
            await served.adapter.finish_session("s", base_sample=Sample(index=1)),
        )

    first, second, (sample,) = asyncio.run(talk())
    (use,) = first["content"]
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "look", {"at": "sky"})
    assert first["stop_reason"] == "tool_use" and second["stop_reason"] == "end_turn"
    assert second["content"] == [{"type": "text", "text": "blue"}]
    assert _text(sample.tokens) == f"[look]s:be brief$u:colour?$a:{CALL}t:blue sky$a:blue$"
    assert _trained(sample) == CALL + "blue$"


def _events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_streams_carry_the_same_answers(servers: list[Served]) -> None:
    chat = Served(OpenAIAdapter, Engine(f"see {CALL}"))
    messages = Served(AnthropicAdapter, Engine(f"hm</think>see {CALL}"), reasoning_parser="qwen3")
    servers += [chat, messages]
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}

    async def both() -> tuple[str, str]:
        for served in (chat, messages):
            served.adapter.open_session("s")
        options = {"stream_options": {"include_usage": True}, "tools": TOOLS}
        _, one = await chat.post("/v1/chat/completions", {**body, **options})
        tools = [{"name": "look", "input_schema": {}}]
        _, other = await messages.post("/v1/messages", {**body, "max_tokens": 99, "tools": tools})
        return one, other

    one, other = asyncio.run(both())
    assert one.rstrip().endswith("data: [DONE]")
    start, end, usage = _events(one)
    assert start["choices"][0]["delta"]["content"] == "see"
    assert start["choices"][0]["delta"]["tool_calls"][0]["index"] == 0
    assert end["choices"][0]["finish_reason"] == "tool_calls"
    assert usage["usage"]["prompt_tokens"] == len("[look]u:x$a:")
    events = _events(other)
    kinds = [event["type"] for event in events]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", *block * 3, "message_delta", "message_stop"]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert deltas == [
        {"type": "thinking_delta", "thinking": "hm"},
        {"type": "text_delta", "text": "see"},
        {"type": "input_json_delta", "partial_json": '{"at": "sky"}'},
    ]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_what_can_not_be_answered_is_refused_in_the_protocol_s_own_form(
    servers: list[Served],
) -> None:
    chat, messages = Served(OpenAIAdapter, Engine("4$")), Served(AnthropicAdapter, Engine("4$"))
    servers += [chat, messages]
    body = {"messages": [{"role": "user", "content": "too long for it"}], "max_tokens": 3}

    async def refused() -> list[tuple[int, str]]:
        found = []
        for served, path in ((chat, "/v1/chat/completions"), (messages, "/v1/messages")):
            found.append(await served.post(path, body, key="nobody"))
            served.adapter.open_session("s", max_context_tokens=10)
            found.append(await served.post(path, body))
            found.append(await served.post(path, {"messages": "x"}))
            source = {"type": "base64", "media_type": "image/png", "data": ""}
            for kind in ("image_url", "image"):
                content = [{"type": kind, "image_url": {"url": "data:,"}, "source": source}]
                if kind == ("image_url" if served is chat else "image"):
                    picture = {"messages": [{"role": "user", "content": content}], "max_tokens": 3}
                    found.append(await served.post(path, picture))
            served.engine.status = 503
            short = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
            found.append(await served.post(path, short))
        return [(status, answer["error"]["message"]) for status, answer in found]

    answers = asyncio.run(refused())
    assert [status for status, _ in answers] == [401, 400, 400, 400, 503] * 2
    assert "'nobody' is not open" in answers[0][1]
    assert "prompt is too long: 22 tokens, the context has 10" in answers[1][1]
    assert "image_url parts are not taken" in answers[3][1]
    assert "no engine" in answers[4][1]


def test_the_context_bounds_the_response_and_a_count_is_the_prompt_s(servers: list[Served]) -> None:
    served = Served(AnthropicAdapter, Engine("4$"))
    servers.append(served)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 100}

    async def ask() -> Any:
        served.adapter.open_session("s", max_context_tokens=20)
        await served.post("/v1/messages", body)
        return await served.post("/v1/messages/count_tokens", body)

    assert asyncio.run(ask()) == (200, {"input_tokens": len("[]u:x$a:")})
    assert served.engine.requests[0]["sampling_params"]["max_new_tokens"] == 20 - 8


def test_finishing_ends_what_is_under_way_and_may_be_called_again(servers: list[Served]) -> None:
    served = Served(OpenAIAdapter, Engine("4$"))
    servers.append(served)
    body = {"messages": [{"role": "user", "content": "x"}]}

    async def cut_off() -> list[Any]:
        served.adapter.open_session("s")
        await served.post("/v1/chat/completions", body)
        served.engine.hangs = True
        waiting = asyncio.ensure_future(served.post("/v1/chat/completions", body))
        while len(served.engine.requests) < 2:
            await asyncio.sleep(0.01)
        samples = await served.adapter.finish_session("s", base_sample=Sample(index=0))
        again = await served.adapter.finish_session("s", base_sample=Sample(index=0))
        (ended,) = await asyncio.gather(waiting, return_exceptions=True)
        while not served.engine.aborted:
            await asyncio.sleep(0.01)
        served.engine.hangs = False
        status, _ = await served.post("/v1/chat/completions", body)
        await served.adapter.drop_session("never opened", wait_timeout=1)
        return [samples, again, ended, status]

    samples, again, ended, status = asyncio.run(asyncio.wait_for(cut_off(), 20))
    assert [sample.response for sample in samples] == ["4$"] and again == []
    assert isinstance(ended, aiohttp.ClientError) or ended[0] >= 400
    assert served.engine.aborted == [served.engine.requests[1]["rid"]] and status == 401


@pytest.mark.usefixtures("aliases_on")
@pytest.mark.parametrize("family", ["slime", "vime"])
def test_the_addresses_that_plugins_import(family: str) -> None:
    names = {
        "adapters": ["AnthropicAdapter", "OpenAIAdapter"],
        "adapters.common": ["flatten_content", "tool_call_dict", "TurnRecord"],
        "harness": ["ClaudeCodeHarness", "CodexHarness", "CLAUDE_CODE"],
        "harness.common": ["BaseHarness", "HarnessContext", "run_agent"],
        "sandbox": ["Sandbox", "E2BSandbox", "exec_and_wait", "ensure_agent_user"],
        "aiohttp_threaded": ["run_app_in_thread", "FilteredAccessLogger"],
        "trajectory": ["TrajectoryManager", "TurnRecord"],
        "trajectory_manager": ["TrajectoryManager"],
        "parsing": ["parse_model_output"],
    }
    for module, wanted in names.items():
        found = importlib.import_module(f"{family}.agent.{module}")
        assert all(hasattr(found, name) for name in wanted)


def test_contents_are_flattened_and_keys_are_read() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"content": [{"text": "c"}]}, {"type": "image"}]
    assert flatten_content(parts) == "a\nb\nc" and flatten_content(None) == ""
    assert sid_from_bearer("Bearer x y") == "x y" and sid_from_bearer("Basic x") is None
