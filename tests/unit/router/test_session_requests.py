"""What a client may ask of a session, and what it is told otherwise."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dovetail.types import SamplingParams
from tests.unit.router.talking import END, HELLO, TOOLS, World, in_world, samples_of, talking

TEXT: dict[str, Any] = {"type": "text"}
DEEP: Any = {}
PARTS: Any = "x"
for _ in range(400):
    DEEP, PARTS = {"a": DEEP}, [TEXT | {"content": PARTS}]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": HELLO, "n": 2}, "one answer"),
        ({"messages": HELLO, "tools": "add"}, "tools"),
        ({"messages": HELLO, "tools": [{"function": 3}]}, "tools[0].function"),
        ({"messages": [{"role": "user", "content": "x", "more": DEEP}]}, "inside each other"),
        ({"messages": [{"role": "user", "content": PARTS}]}, "inside each other"),
        ({"messages": HELLO, "max_tokens": "many"}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text"),
        ({"messages": [{"role": "user", "content": "ab" * 5000}]}, "maximum context length"),
        ({"messages": HELLO, "chat_template_kwargs": 3}, "chat_template_kwargs"),
        ({"messages": [{"role": "assistant", "tool_calls": ["add"]}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [TEXT | {"text": 5}]}]}, "expected text"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {"type": "image_url"}}]}, "reads text"),
    ],
)
def test_malformed_requests_are_told_what_is_wrong_and_not_recorded(
    body: dict[str, Any], said: str
) -> None:
    async def work(world: World, session_id: str) -> None:
        answered = await world.ask("POST", f"/sessions/{session_id}/v1/chat/completions", body)
        assert answered.status == 400, answered.body
        assert said in answered.json["error"]["message"]
        assert world.talker.requests == [] and await samples_of(world, session_id) == []

    in_world([f"a{END}"], work)


def test_a_malformed_wish_for_samples_is_the_clients_fault() -> None:
    async def work(world: World, session_id: str) -> None:
        path = f"/sessions/{session_id}/samples"
        for body, field in (
            ({"max_seq_len": "x"}, "max_seq_len"),
            ({"metadata": 3}, "metadata"),
            ({"metadata": DEEP}, "metadata"),
        ):
            answered = await world.ask("POST", path, body)
            assert (answered.status, answered.json["error"]["param"]) == (400, field)

    in_world([f"a{END}"], work)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"session_id": 3}, "session_id"),
        ({"session_id": "a/b"}, "session_id"),
        ({"session_id": "x" * 300}, "session_id"),
        ({"max_context_len": 0}, "max_context_len"),
        ({"temperature": "hot"}, "temperature"),
        ({"sampling_params": []}, "sampling_params"),
        ({"sampling_params": {"top_p": 2}}, "sampling_params.top_p"),
        ({"evaluation": "yes"}, "evaluation"),
    ],
)
def test_a_malformed_wish_for_a_session_opens_none(body: dict[str, Any], field: str) -> None:
    async def work(world: World, _: str) -> None:
        answered = await world.ask("POST", "/sessions", body)
        assert (answered.status, answered.json["error"]["param"]) == (400, field)
        assert len(world.sessions.store) == 1

    in_world([f"a{END}"], work)


def test_ids_that_no_tokenizer_has_are_the_clients_fault() -> None:
    async def work(world: World, session_id: str) -> None:
        path = f"/sessions/{session_id}/v1/completions"
        answered = await world.ask("POST", path, {"prompt": [2**40]})
        assert (answered.status, answered.json["error"]["param"]) == (400, "prompt")

    in_world([f"a{END}"], work)


def test_what_agents_send_beside_is_no_reason_to_refuse_them() -> None:
    async def work(world: World, session_id: str) -> None:
        more = {"reasoning_effort": "low", "parallel_tool_calls": True, "user": "me", "store": True}
        more |= {"tool_choice": "required", "response_format": {"type": "json_object"}}
        roles = [{"role": "developer", "content": [{"type": "text", "text": "be"}]}, *HELLO]
        assert (await world.chat(session_id, roles, tools=TOOLS, **more))["content"] == "a"
        prompt = world.talker.tokenizer.decode(world.talker.requests[0].prompt_ids)
        assert prompt.startswith(f"[add]<|im_start|>system\nbe{END}")

    async def run() -> None:
        async with talking([f"a{END}"]) as world:
            session = world.sessions.store.open(SamplingParams())
            await work(world, session.session_id)

    asyncio.run(run())
