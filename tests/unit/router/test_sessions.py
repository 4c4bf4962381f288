"""Sessions over HTTP: what clients get, and what is recorded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dovetail.router.sessions.message_match import role_content_only, strict
from dovetail.router.sessions.samples import Collecting, drop_retries, keep_all
from dovetail.types import Sample, SamplingParams
from tests.unit.router.talking import (
    CHATML,
    DROPS_THOUGHTS,
    END,
    HELLO,
    TOOLS,
    World,
    in_world,
    samples_of,
    talking,
)

CALL = '<tool_call>{"name":"add","arguments":{"b":2,"a":1}}</tool_call>'


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
        (sample,) = await samples_of(world, session_id)
        assert _said(world, sample, 1) == [f"so {CALL}{END}", f"it is 3 oops{END}"]
        between = f"\n<|im_start|>tool\n3{END}\n<|im_start|>assistant\n"
        assert _said(world, sample, 0) == [between]
        assert sample["status"] == "completed"
        assert sample["weight_versions"] == ["3", "4", "3", "4"]
        assert sample["metadata"]["strand"] == {"number": 0, "of": 1}
        assert sample["prefix_cache_info"]["cached_tokens"] == 2

    in_world([f"so {CALL}{END}", f"it is 3 oops{END}"], work)


def test_a_template_that_drops_thoughts_begins_a_further_sample() -> None:
    lines = [f"<think>hm</think>yes{END}", f"<think>ah</think>no{END}"]

    async def work(world: World, session_id: str) -> list[str]:
        first = await world.chat(session_id, HELLO)
        await world.chat(session_id, [*HELLO, first, {"role": "user", "content": "sure?"}])
        samples = await samples_of(world, session_id)
        assert all(0 not in sample["loss_mask"] for sample in samples[: len(samples) - 1])
        return [world.talker.tokenizer.decode(sample["tokens"]) for sample in samples]

    user = "<|im_start|>user\n{}" + END + "\n<|im_start|>assistant\n"
    whole = user.format("hello") + lines[0]
    assert in_world(lines, work, template=DROPS_THOUGHTS) == [
        whole,
        f"{user.format('hello')}yes{END}\n{user.format('sure?')}{lines[1]}",
    ]
    both = f"{whole}\n{user.format('sure?')}{lines[1]}"
    assert in_world(lines, work, template=DROPS_THOUGHTS, keep_rewritten=True) == [both]
    assert in_world(lines, work, template=CHATML) == [both]


def test_a_history_that_deviates_is_another_sample_and_what_both_share_is_trained_once() -> None:
    lines = [f"one{END}", f"two{END}", f"three{END}"]

    async def work(world: World, session_id: str) -> None:
        first = await world.chat(session_id, HELLO)
        base = [*HELLO, first]
        second = await world.chat(session_id, [*base, {"role": "user", "content": "a"}])
        assert second["content"] == "two"
        await world.chat(session_id, [*base, {"role": "user", "content": "b"}])
        one, other = await samples_of(world, session_id)
        assert _said(world, one, 1) == [f"one{END}", f"two{END}"]
        assert _said(world, other, 1) == [f"three{END}"] and 0 not in other["loss_mask"]
        # What both share is counted once, too.
        told = [sample["prefix_cache_info"]["cached_tokens"] for sample in (one, other)]
        assert told == [2, 1]
        # A changed past shares nothing.
        changed = [{"role": "user", "content": "hey"}, first, {"role": "user", "content": "a"}]
        await world.chat(session_id, changed)
        assert len(await samples_of(world, session_id)) == 3

    in_world(lines, work)


def test_an_answer_that_was_asked_for_again_is_left_out_unless_all_are_wanted() -> None:
    async def work(world: World, session_id: str) -> list[list[str]]:
        await world.chat(session_id, HELLO)
        await world.chat(session_id, HELLO)
        return [_said(world, one, 1) for one in await samples_of(world, session_id)]

    lines = [f"one{END}", f"two{END}"]
    assert in_world(lines, work) == [[f"two{END}"]]
    everything = Collecting(pick=keep_all)
    assert in_world(lines, work, collecting=everything) == [[f"one{END}"], [f"two{END}"]]


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
        (sample,) = await samples_of(world, session_id, metadata={"score": 0.5})
        assert sample["reward"] == 0.5 and "leaf" not in sample["metadata"]
        nodes = seen[0]["tree"]["nodes"]
        assert [node["parent"] for node in nodes] == [None, 0]
        assert seen[0]["tree"]["leaves"] == [{"node_id": 1, "path_node_ids": [0, 1]}]
        begin, end = nodes[1]["completion_span"]
        assert sample["tokens"][begin:end] == world.talker.results[1].token_ids

    in_world([f"a{END}"], work, collecting=Collecting(pick, change))


def test_a_picker_that_makes_samples_up_is_refused() -> None:
    async def work(world: World, session_id: str) -> None:
        await world.chat(session_id, HELLO)
        answered = await world.ask("POST", f"/sessions/{session_id}/samples", {})
        assert answered.status == 422 and "was not given" in answered.json["message"]

    in_world([f"a{END}"], work, collecting=Collecting(pick=lambda samples, metadata: [Sample()]))


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
        return len(await samples_of(world, session_id))

    settings = {} if matches is None else {"matches": matches}
    assert in_world([f"so {CALL}{END}", f"3{END}"], work, **settings) == count


def test_a_stop_string_a_limit_and_a_cut_character_keep_their_ids() -> None:
    async def work(world: World, session_id: str) -> None:
        first = await world.chat(session_id, HELLO, stop=["12"])
        assert first["content"] == "ab "
        history = [*HELLO, first, {"role": "user", "content": "go on"}]
        second = await world.chat(session_id, history, max_tokens=2)
        assert second["content"] == "\ufffd"
        history += [second, {"role": "user", "content": "more"}]
        await world.chat(session_id, history)
        (sample,) = await samples_of(world, session_id)
        ids = [one for result in world.talker.results for one in result.token_ids]
        pairs = zip(
            sample["tokens"][-sample["response_length"] :], sample["loss_mask"], strict=True
        )
        assert [one for one, mask in pairs if mask] == ids
        # What the model did not end is ended by the template.
        assert f"12{END}\n<|im_start|>user\ngo on" in sample["response"]

    in_world(["ab 12 oops", "日本", f"oops{END}"], work)


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

    in_world([f"so {CALL}{END}"], work)


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
        (sample,) = await samples_of(world, session_id)
        assert _said(world, sample, 1) == ["ab ", "ab "] and _said(world, sample, 0) == ["12"]
        models = (await world.ask("GET", f"{base}/v1/models")).json
        assert [one["id"] for one in models["data"]] == ["m"]
        record = (await world.ask("GET", base)).json
        assert [one["parent"] for one in record["records"]] == [None, 0]
        assert record["records"][1]["logprobs"] == world.talker.results[1].logprobs

    in_world(["ab oops"], work)


@pytest.mark.parametrize("base", ["", "/v1", "/v1/v1"])
def test_a_base_url_may_end_with_its_version_or_not(base: str) -> None:
    async def work(world: World, session_id: str) -> int:
        path = f"/sessions/{session_id}{base}/chat/completions"
        return (await world.ask("POST", path, {"messages": HELLO})).status

    assert in_world([f"a{END}"], work) == 200


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


def test_samples_longer_than_asked_end_with_the_last_turn_that_fits() -> None:
    async def work(world: World, session_id: str) -> None:
        first = await world.chat(session_id, HELLO)
        await world.chat(session_id, [*HELLO, first, *HELLO])
        (whole,) = await samples_of(world, session_id)
        (cut,) = await samples_of(world, session_id, max_seq_len=len(whole["tokens"]) - 1)
        assert cut["status"] == "truncated" and _said(world, cut, 1) == [f"a{END}"]
        answered = await world.ask("POST", f"/sessions/{session_id}/samples", {"max_seq_len": 2})
        assert answered.json["empty_reason"] == "all_truncated"

    in_world([f"a{END}"], work)
