"""Whatever is said in a session: the ids that are trained on are the ids that were sampled."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.router.sessions.samples import Collecting, keep_all
from dovetail.types import Sample, SamplingParams
from tests.unit.router.talking import CHATML, DROPS_THOUGHTS, END, World, talking

WORDS = ("hello ab", "the 12 oops", "日本 🙂 é", "x" * 9, "}}\n\n", " <think>so</think> yes", "")
CALLS = (
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>',
    '<tool_call>{"name":"add","arguments":{"b":"é 🙂","a":12}}</tool_call>',
    "<tool_call>{broken</tool_call>",
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def _line(draw: random.Random) -> str:
    words = draw.choices(WORDS, k=draw.randint(1, 3))
    calls = draw.choices(CALLS, k=draw.choice((0, 0, 1, 2)))
    return " ".join([*words, *calls]) + draw.choice((END, END, END, ""))


class Client:
    """Talks at random, and never says what it was not told."""

    def __init__(self, world: World, session_id: str, draw: random.Random) -> None:
        self.world, self.session_id, self.draw = world, session_id, draw
        self.known: list[list[dict[str, Any]]] = [[{"role": "user", "content": "ab 日本"}]]
        self.texts = ["the hello"]

    async def step(self) -> None:
        """One more request: from the last history, an older one, or a plain completion."""
        if self.draw.random() < 0.15:
            return await self._complete()
        history = self.known[-1] if self.draw.random() < 0.7 else self.draw.choice(self.known)
        if self.draw.random() < 0.1:
            history = [{**history[0], "content": "rewritten"}, *history[1:]]
        more = {"tools": TOOLS} if self.draw.random() < 0.8 else {}
        more |= {"stream": True} if self.draw.random() < 0.3 else {}
        more |= {"stop": ["oops"]} if self.draw.random() < 0.2 else {}
        more |= {"max_tokens": self.draw.randint(1, 12)} if self.draw.random() < 0.3 else {}
        message = await self.world.chat(self.session_id, history, **more)
        self.known.append([*history, message, *self._follow_up(message)])
        return None

    def _follow_up(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        calls = message.get("tool_calls") or []
        if calls and self.draw.random() < 0.9:
            return [{"role": "tool", "tool_call_id": one["id"], "content": "3"} for one in calls]
        return [{"role": "user", "content": self.draw.choice(WORDS)}]

    async def _complete(self) -> None:
        prompt = self.draw.choice(self.texts)
        path = f"/sessions/{self.session_id}/v1/completions"
        answered = await self.world.ask("POST", path, {"prompt": prompt, "max_tokens": 8})
        assert answered.status == 200
        self.texts.append(prompt + answered.json["choices"][0]["text"] + " 12")


async def _talk(seed: int, turns: int, template: str, keep_rewritten: bool) -> None:
    draw = random.Random(seed)
    lines = [_line(draw) for _ in range(turns)]
    how = Collecting(pick=keep_all)
    settings = {"collecting": how, "keep_rewritten": keep_rewritten}
    async with talking(lines, seed=seed, template=template, **settings) as world:
        session = world.sessions.store.open(SamplingParams(max_new_tokens=200, seed=1))
        client = Client(world, session.session_id, draw)
        for _ in range(turns):
            await client.step()
        samples = world.sessions.collect(session, Sample(index=5))
        _check(world, samples)


def _check(world: World, samples: list[Sample]) -> None:
    requests, results = world.talker.requests, world.talker.results
    for request, result in zip(requests, results, strict=True):
        prompt, out = list(request.prompt_ids), result.token_ids
        end = len(prompt) + len(out)
        trained = 0
        for sample in samples:
            where = slice(len(prompt) - sample.prompt_length, end - sample.prompt_length)
            if where.start < 0 or sample.tokens[:end] != prompt + out:
                continue
            assert sample.loss_mask is not None and sample.rollout_log_probs is not None
            if out and sample.rollout_log_probs[where] == result.logprobs:
                assert sample.loss_mask[where] == [1] * len(out)
                trained += 1
        assert trained == bool(out), f"{trained} samples train an answer"
    sampled = sum(len(result.token_ids) for result in results)
    assert sum(sum(sample.loss_mask or []) for sample in samples) == sampled
    for sample in samples:
        assert sample.loss_mask is not None and sample.rollout_log_probs is not None
        assert len(sample.loss_mask) == len(sample.rollout_log_probs) == sample.response_length
        pairs = zip(sample.loss_mask, sample.rollout_log_probs, strict=True)
        assert all(logprob == 0.0 for mask, logprob in pairs if not mask)
        assert sample.index == 5 and sample.prompt_length > 0
        assert (sample.rollout_id == 5) is (len(samples) > 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    turns=st.integers(1, 9),
    template=st.sampled_from((CHATML, DROPS_THOUGHTS)),
    keep_rewritten=st.booleans(),
)
def test_ids_trained_are_ids_sampled_and_logprobs_are_the_engines(
    seed: int, turns: int, template: str, keep_rewritten: bool
) -> None:
    asyncio.run(_talk(seed, turns, template, keep_rewritten))
