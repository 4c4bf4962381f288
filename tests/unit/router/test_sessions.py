"""Sessions over HTTP: what clients get, what is recorded, and how sessions end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from dovetail.router.fields import RequestError
from dovetail.router.sessions.message_match import role_content_only, strict
from dovetail.router.sessions.samples import Collecting, drop_retries, keep_all
from dovetail.router.sessions.server import SERVED
from dovetail.router.sessions.store import SessionLimits, SessionStore
from dovetail.types import Sample, SamplingParams
from tests.unit.router.talking import CHATML, DROPS_THOUGHTS, END, World, talking

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = '<tool_call>{"name":"add","arguments":{"b":2,"a":1}}</tool_call>'
HELLO = [{"role": "user", "content": "hello"}]
TEXT: dict[str, Any] = {"type": "text"}
DEEP: Any = {}
PARTS: Any = "x"
for _ in range(400):
    DEEP, PARTS = {"a": DEEP}, [TEXT | {"content": PARTS}]


def _in_world(
    lines: list[str], work: Callable[[World, str], Awaitable[Any]], **settings: Any
) -> Any:
    async def run() -> Any:
        async with talking(lines, **settings) as world:
            return await work(world, await world.open())

    return asyncio.run(run())


async def _samples(world: World, session_id: str, **more: Any) -> list[dict[str, Any]]:
    answered = await world.ask("POST", f"/sessions/{session_id}/samples", more)
    assert answered.status == 200, answered.body
    return list(answered.json["samples"])


def _said(world: World, sample: dict[str, Any], trained: int) -> list[str]:
    """The runs of ids with this loss mask, as text."""
    runs: list[list[int]] = [[]]
    ids = sample["tokens"][-sample["response_length"] :]
    for one, mask in zip(ids, sample["loss_mask"], strict=True):
        if mask == trained:
            runs[-1].append(one)
        elif runs[-1]:
            runs.append([])
    return [world.talker.tokenizer.decode(run) for run in runs if run]


def test_turns_that_go_on_are_one_sample_and_only_new_messages_are_tokenised() -> None:
    async def work(world: World, session_id: str) -> None:
        first = await world.chat(session_id, HELLO, tools=TOOLS)
        assert first["content"] == "so" and first["tool_calls"][0]["function"] == {
            "name": "add",
            "arguments": '{"b": 2, "a": 1}',
        }
        told = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "3"}
        second = await world.chat(session_id, [*HELLO, first, told], tools=TOOLS)
        assert second == {"role": "assistant", "content": "it is 3 oops"}
        asked, again = world.talker.requests
        sampled = world.talker.results[0].token_ids
        # What was sampled stands there as it was, in odd pieces and without the template's spaces.
        start = [*asked.prompt_ids, *sampled]
        assert list(again.prompt_ids[: len(start)]) == start
        assert again.session_id == session_id
        (sample,) = await _samples(world, session_id)
        assert _said(world, sample, 1) == [f"so {CALL}{END}", f"it is 3 oops{END}"]
        between = f"\n<|im_start|>tool\n3{END}\n<|im_start|>assistant\n"
        assert _said(world, sample, 0) == [between]
        assert sample["status"] == "completed"
        assert sample["weight_versions"] == ["3", "4", "3", "4"]
        assert sample["metadata"]["strand"] == {"number": 0, "of": 1}
        assert sample["prefix_cache_info"]["cached_tokens"] == 2

    _in_world([f"so {CALL}{END}", f"it is 3 oops{END}"], work)


def test_a_template_that_drops_thoughts_begins_a_further_sample() -> None:
    lines = [f"<think>hm</think>yes{END}", f"<think>ah</think>no{END}"]

    async def work(world: World, session_id: str) -> list[str]:
        first = await world.chat(session_id, HELLO)
        await world.chat(session_id, [*HELLO, first, {"role": "user", "content": "sure?"}])
        samples = await _samples(world, session_id)
        assert all(0 not in sample["loss_mask"] for sample in samples[: len(samples) - 1])
        return [world.talker.tokenizer.decode(sample["tokens"]) for sample in samples]

    user = "<|im_start|>user\n{}" + END + "\n<|im_start|>assistant\n"
    whole = user.format("hello") + lines[0]
    assert _in_world(lines, work, template=DROPS_THOUGHTS) == [
        whole,
        f"{user.format('hello')}yes{END}\n{user.format('sure?')}{lines[1]}",
    ]
    both = f"{whole}\n{user.format('sure?')}{lines[1]}"
    assert _in_world(lines, work, template=DROPS_THOUGHTS, keep_rewritten=True) == [both]
    assert _in_world(lines, work, template=CHATML) == [both]


def test_a_history_that_deviates_is_another_sample_and_what_both_share_is_trained_once() -> None:
    lines = [f"one{END}", f"two{END}", f"three{END}"]

    async def work(world: World, session_id: str) -> None:
        first = await world.chat(session_id, HELLO)
        base = [*HELLO, first]
        second = await world.chat(session_id, [*base, {"role": "user", "content": "a"}])
        assert second["content"] == "two"
        await world.chat(session_id, [*base, {"role": "user", "content": "b"}])
        one, other = await _samples(world, session_id)
        assert _said(world, one, 1) == [f"one{END}", f"two{END}"]
        assert _said(world, other, 1) == [f"three{END}"] and 0 not in other["loss_mask"]
        # What both share is counted once, too.
        told = [sample["prefix_cache_info"]["cached_tokens"] for sample in (one, other)]
        assert told == [2, 1]
        # A changed past shares nothing.
        changed = [{"role": "user", "content": "hey"}, first, {"role": "user", "content": "a"}]
        await world.chat(session_id, changed)
        assert len(await _samples(world, session_id)) == 3

    _in_world(lines, work)


def test_an_answer_that_was_asked_for_again_is_left_out_unless_all_are_wanted() -> None:
    async def work(world: World, session_id: str) -> list[list[str]]:
        await world.chat(session_id, HELLO)
        await world.chat(session_id, HELLO)
        return [_said(world, one, 1) for one in await _samples(world, session_id)]

    lines = [f"one{END}", f"two{END}"]
    assert _in_world(lines, work) == [[f"two{END}"]]
    everything = Collecting(pick=keep_all)
    assert _in_world(lines, work, collecting=everything) == [[f"one{END}"], [f"two{END}"]]


def test_hooks_pick_and_change_samples_and_see_the_tree_and_the_agents_word() -> None:
    seen: list[Any] = []

    def pick(samples: list[Sample], metadata: dict[str, Any]) -> list[Sample]:
        seen.append(metadata)
        assert all(one.metadata["leaf"]["path_node_ids"] for one in samples)
        return drop_retries(samples, metadata)

    def change(samples: list[Sample], metadata: dict[str, Any]) -> list[Sample]:
        for one in samples:
            one.reward = metadata["agent"]["score"]
        return samples

    async def work(world: World, session_id: str) -> None:
        first = await world.chat(session_id, HELLO)
        await world.chat(session_id, [*HELLO, first, *HELLO])
        (sample,) = await _samples(world, session_id, metadata={"score": 0.5})
        assert sample["reward"] == 0.5 and "leaf" not in sample["metadata"]
        nodes = seen[0]["tree"]["nodes"]
        assert [node["parent"] for node in nodes] == [None, 0]
        assert seen[0]["tree"]["leaves"] == [{"node_id": 1, "path_node_ids": [0, 1]}]
        begin, end = nodes[1]["completion_span"]
        assert sample["tokens"][begin:end] == world.talker.results[1].token_ids

    _in_world([f"a{END}"], work, collecting=Collecting(pick, change))


def test_a_picker_that_makes_samples_up_is_refused() -> None:
    async def work(world: World, session_id: str) -> None:
        await world.chat(session_id, HELLO)
        answered = await world.ask("POST", f"/sessions/{session_id}/samples", {})
        assert answered.status == 422 and "was not given" in answered.json["message"]

    _in_world([f"a{END}"], work, collecting=Collecting(pick=lambda samples, metadata: [Sample()]))


@pytest.mark.parametrize(
    ("matches", "count"),
    [(None, 1), (strict, 2), (role_content_only, 1)],
    ids=["default", "strict", "role_content_only"],
)
def test_arguments_that_a_client_formats_anew_are_the_same_call_unless_compared_strictly(
    matches: Any, count: int
) -> None:
    async def work(world: World, session_id: str) -> int:
        first = await world.chat(session_id, HELLO, tools=TOOLS)
        (call,) = first["tool_calls"]
        call["function"]["arguments"] = '{"a":1,"b":2}'
        sent = {**first, "refusal": None, "annotations": []}
        told = {"role": "tool", "tool_call_id": call["id"], "content": "3"}
        await world.chat(session_id, [*HELLO, sent, told], tools=TOOLS)
        return len(await _samples(world, session_id))

    settings = {} if matches is None else {"matches": matches}
    assert _in_world([f"so {CALL}{END}", f"3{END}"], work, **settings) == count


def test_a_stop_string_a_limit_and_a_cut_character_keep_their_ids() -> None:
    async def work(world: World, session_id: str) -> None:
        first = await world.chat(session_id, HELLO, stop=["12"])
        assert first["content"] == "ab "
        history = [*HELLO, first, {"role": "user", "content": "go on"}]
        second = await world.chat(session_id, history, max_tokens=2)
        assert second["content"] == "\ufffd"
        history += [second, {"role": "user", "content": "more"}]
        await world.chat(session_id, history)
        (sample,) = await _samples(world, session_id)
        ids = [one for result in world.talker.results for one in result.token_ids]
        pairs = zip(
            sample["tokens"][-sample["response_length"] :], sample["loss_mask"], strict=True
        )
        assert [one for one, mask in pairs if mask] == ids
        # What the model did not end is ended by the template.
        assert f"12{END}\n<|im_start|>user\ngo on" in sample["response"]

    _in_world(["ab 12 oops", "日本", f"oops{END}"], work)


def test_streams_say_the_same_as_whole_answers() -> None:
    async def work(world: World, session_id: str) -> None:
        path = f"/sessions/{session_id}/v1/chat/completions"
        body = {"messages": HELLO, "tools": TOOLS, "stream": True, "logprobs": True}
        answered = await world.ask("POST", path, body | {"stream_options": {"include_usage": True}})
        assert answered.headers["content-type"].startswith("text/event-stream")
        *chunks, usage = answered.events
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 5
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "so"}
        (call,) = chunks[1]["choices"][0]["delta"]["tool_calls"]
        assert call["index"] == 0 and call["function"]["name"] == "add"
        assert chunks[2]["choices"][0]["finish_reason"] == "tool_calls"
        told = [one["logprob"] for one in chunks[0]["choices"][0]["logprobs"]["content"]]
        assert told == world.talker.results[0].logprobs
        assert len({chunk["id"] for chunk in chunks}) == 1

    _in_world([f"so {CALL}{END}"], work)


def test_completions_models_and_records() -> None:
    async def work(world: World, session_id: str) -> None:
        base = f"/sessions/{session_id}"
        body = {"prompt": "hel", "max_tokens": 3, "logprobs": 1, "return_token_ids": True}
        whole = (await world.ask("POST", f"{base}/v1/completions", body)).json
        (choice,) = whole["choices"]
        assert choice["text"] == "ab " and choice["finish_reason"] == "length"
        assert choice["token_ids"] == world.talker.results[0].token_ids
        assert whole["usage"]["completion_tokens"] == 3
        more = {"prompt": "helab 12", "max_tokens": 3, "stream": True}
        events = (await world.ask("POST", f"{base}/v1/completions", more)).events
        assert events[0]["choices"][0]["text"] == "ab "
        (sample,) = await _samples(world, session_id)
        assert _said(world, sample, 1) == ["ab ", "ab "] and _said(world, sample, 0) == ["12"]
        models = (await world.ask("GET", f"{base}/v1/models")).json
        assert [one["id"] for one in models["data"]] == ["m"]
        record = (await world.ask("GET", base)).json
        assert [one["parent"] for one in record["records"]] == [None, 0]
        assert record["records"][1]["logprobs"] == world.talker.results[1].logprobs

    _in_world(["ab oops"], work)


@pytest.mark.parametrize("base", ["", "/v1", "/v1/v1"])
def test_a_base_url_may_end_with_its_version_or_not(base: str) -> None:
    async def work(world: World, session_id: str) -> int:
        path = f"/sessions/{session_id}{base}/chat/completions"
        return (await world.ask("POST", path, {"messages": HELLO})).status

    assert _in_world([f"a{END}"], work) == 200


def test_the_runs_sampling_counts_and_the_client_can_only_ask_for_less() -> None:
    own = SamplingParams(max_new_tokens=9, temperature=0.7, top_k=5, stop=("x",), seed=4)

    async def work(world: World, by_run: bool) -> list[SamplingParams]:
        session = world.sessions.store.open(own)
        body = {"temperature": 0.1, "top_p": 0.5, "max_tokens": 50, "stop": "y", "seed": 1}
        for more in (body, {"max_completion_tokens": 3}):
            await world.chat(session.session_id, HELLO, **more)
        return [request.sampling for request in world.talker.requests]

    async def run(by_run: bool) -> list[SamplingParams]:
        async with talking([f"a{END}"], by_run=by_run) as world:
            return await work(world, by_run)

    first, second = asyncio.run(run(True))
    assert (first.temperature, first.top_p, first.top_k, first.max_new_tokens) == (0.7, 1.0, 5, 9)
    assert first.stop == ("x", "y") and second.max_new_tokens == 3
    assert len({first.seed, second.seed, own.seed, 1}) == 4
    first, second = asyncio.run(run(False))
    assert (first.temperature, first.top_p, first.top_k, first.seed) == (0.1, 0.5, 5, 1)
    assert first.max_new_tokens == 50 and first.stop == ("y",)
    assert (second.temperature, second.max_new_tokens) == (0.7, 3)
    assert second.seed not in (4, None)


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
        assert world.talker.requests == [] and await _samples(world, session_id) == []

    _in_world([f"a{END}"], work)


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

    _in_world([f"a{END}"], work)


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

    _in_world([f"a{END}"], work)


def test_ids_that_no_tokenizer_has_are_the_clients_fault() -> None:
    async def work(world: World, session_id: str) -> None:
        path = f"/sessions/{session_id}/v1/completions"
        answered = await world.ask("POST", path, {"prompt": [2**40]})
        assert (answered.status, answered.json["error"]["param"]) == (400, "prompt")

    _in_world([f"a{END}"], work)


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


def test_a_session_that_ends_cancels_its_requests_and_records_no_more() -> None:
    async def work(world: World, session_id: str) -> None:
        world.talker.held = asyncio.Event()
        asking = asyncio.create_task(
            world.ask("POST", f"/sessions/{session_id}/v1/chat/completions", {"messages": HELLO})
        )
        while not world.talker.requests:
            await asyncio.sleep(0)
        ended = await world.ask("DELETE", f"/sessions/{session_id}")
        assert ended.json == {"session_id": session_id, "deleted": True}
        answered = await asking
        assert answered.status == 410 and "is over" in answered.json["message"]
        assert world.talker.cancelled == 1 and len(world.sessions.store) == 0
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/samples")):
            gone = await world.ask(method, f"/sessions/{session_id}{path}")
            assert gone.status == 404 and "no session" in gone.json["message"]

    _in_world([f"a{END}"], work)


def test_an_aborted_engine_ends_the_session() -> None:
    async def work(world: World, session_id: str) -> None:
        await world.talker.abort()
        body = {"messages": HELLO}
        path = f"/sessions/{session_id}/v1/chat/completions"
        assert (await world.ask("POST", path, body)).status == 410
        assert (await world.ask("POST", path, body)).status == 410
        assert len(world.talker.requests) == 1
        assert world.sessions.store.find(session_id).aborted
        assert await _samples(world, session_id) == []

    _in_world([f"a{END}"], work)


def test_samples_longer_than_asked_end_with_the_last_turn_that_fits() -> None:
    async def work(world: World, session_id: str) -> None:
        first = await world.chat(session_id, HELLO)
        await world.chat(session_id, [*HELLO, first, *HELLO])
        (whole,) = await _samples(world, session_id)
        (cut,) = await _samples(world, session_id, max_seq_len=len(whole["tokens"]) - 1)
        assert cut["status"] == "truncated" and _said(world, cut, 1) == [f"a{END}"]
        answered = await world.ask("POST", f"/sessions/{session_id}/samples", {"max_seq_len": 2})
        assert answered.json["empty_reason"] == "all_truncated"

    _in_world([f"a{END}"], work)


def test_ten_thousand_sessions_are_open_at_once_and_further_ones_are_told_to_come_later() -> None:
    store = SessionStore(SessionLimits(most=10_000))
    sessions = [store.open() for _ in range(10_000)]
    with pytest.raises(RequestError, match="10000 sessions are open") as full:
        store.open()
    assert full.value.status == 503 and full.value.retry_after_s
    assert store.end(sessions[0].session_id) is sessions[0]
    store.open(session_id="mine")
    with pytest.raises(RequestError, match="there is a session 'mine'"):
        store.end(sessions[1].session_id)
        store.open(session_id="mine")


def test_sessions_that_nobody_uses_are_forgotten() -> None:
    store = SessionStore(SessionLimits(idle_s=100))
    old, used = store.open(), store.open()
    old.used_at -= 200
    used.used_at -= 200
    store.find(store.open().session_id)
    assert store.expired == 2 and len(store) == 1 and old.closed
    with pytest.raises(RequestError, match="was not used for 100 s"):
        store.find(used.session_id)


def test_what_sessions_record_is_bounded() -> None:
    async def run() -> None:
        limits = SessionLimits(memory_bytes=6000, turns=2)
        async with talking([f"a{END}"], limits=limits) as world:
            one, other = await world.open(), await world.open()
            await world.chat(one, HELLO)
            await world.chat(one, HELLO)
            path = "/sessions/{}/v1/chat/completions"
            full = await world.ask("POST", path.format(one), {"messages": HELLO})
            assert full.status == 400 and "session-max-turns" in full.json["message"]
            while (more := await world.ask("POST", path.format(other), {"messages": HELLO})) and (
                more.status == 200
            ):
                pass
            assert more.status == 503 and "session-memory-gb" in more.json["message"]
            await world.ask("DELETE", f"/sessions/{one}")
            await world.ask("DELETE", f"/sessions/{other}")
            assert world.sessions.store.size_bytes == 0

    asyncio.run(run())


def test_servers_are_found_by_their_address_as_long_as_they_live() -> None:
    async def run() -> None:
        async with talking([f"a{END}"]) as world:
            SERVED["here:1"] = world.sessions
            assert SERVED["here:1"] is world.sessions

    asyncio.run(run())
