"""What texts are made of: found by the longest known beginning, kept within bounds, and as it is
served before a router."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import pytest

from dovetail.router import text_middleware
from dovetail.router.balancer.pool import Pool
from dovetail.router.bridge import Bridge
from dovetail.router.server import RouterServer
from dovetail.router.text_cache import TextCache, Trajectory
from dovetail.router.text_middleware import RadixTreeMiddleware
from dovetail.router.workers import Behind
from dovetail.types import FinishReason
from tests.unit.router.fakes import HeldEngine, result
from tests.unit.router.scripted import EOS, Client, Letters, Scripted, serving

A = "http://127.0.0.1:11"


def ids(text: str) -> list[int]:
    return Letters().encode(text)


def cache(**bounds: int) -> TextCache:
    return TextCache(Letters, **bounds)


def made(tokens: list[int]) -> list[tuple[float, int]]:
    return [(-float(i + 1), token) for i, token in enumerate(tokens)]


def test_a_text_is_what_was_sampled_as_far_as_that_is_known_and_the_rest_is_encoded() -> None:
    texts = cache()
    # 300 stands for "bc": nothing that the tokenizer would say.
    assert texts.insert("abc", [97, 300], [0.0, -0.5], [0, 1], "3")
    assert texts.retrieve_from_text("abc") == ([97, 300], [0.0, -0.5], [0, 1])
    assert texts.retrieve_from_text("abcd") == ([97, 300, 100], [0.0, -0.5, 0.0], [0, 1, 0])
    assert texts.retrieve_from_text("ab", return_logprob=False) == ([97, 98], None, [0, 0])
    with pytest.raises(ValueError, match="2 tokens have 1 logprobs"):
        texts.insert("x", [1, 2], [0.0])


def test_the_longest_beginning_counts_among_texts_that_branch_anywhere() -> None:
    """Against a dictionary, with texts that come and go."""
    chance, texts, kept = random.Random(0), cache(), {}
    for number in range(2000):
        text = "".join(chance.choices("ab", k=chance.randint(1, 12)))
        if chance.random() < 0.3 and kept:
            gone = chance.choice(list(kept))
            node = texts._node(gone)
            texts._forget(node)
            del kept[gone]
        elif chance.random() < 0.6:
            texts.insert(text, [number], [-1.0], [1])
            kept[text] = number
        known = [one for one in kept if text.startswith(one)]
        longest = max(known, key=len, default="")
        head = [kept[longest]] if known else []
        assert texts.whole(text).tokens == head + ids(text[len(longest) :])
        assert len(texts) == len(kept)
    for text in list(kept):
        texts._forget(texts._node(text))
    assert not texts._root.children and texts.bytes == 0


def test_an_end_that_the_answer_does_not_show_is_trained_on_but_not_said_twice() -> None:
    texts = cache()
    texts.remember("q", Trajectory([], [], []).followed(ids("q")), "ab", made([*ids("ab"), EOS]), 1)
    assert texts.whole("qab").tokens == [*ids("qab"), EOS]
    assert texts.whole("qab").loss_mask == [0, 1, 1, 1]
    # The next turn says the end itself, or goes on without one.
    assert texts.prompt("qab<eos>n").tokens == [*ids("qab"), EOS, *ids("n")]
    assert texts.prompt("qab<eos>n").loss_mask == [0, 1, 1, 1, 0]
    assert texts.prompt("qabn").tokens == ids("qabn")
    assert texts.prompt("qab").tokens == ids("qab")


def test_a_stop_string_that_was_cut_off_within_a_token_is_encoded_from_there() -> None:
    class Pairs(Letters):
        def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
            return "".join("bc" if one == 300 else chr(one) for one in token_ids)

    texts = TextCache(Pairs)
    texts.remember("q", Trajectory([], [], []).followed(ids("q")), "ab", made([97, 300]), 1)
    assert texts.whole("qab").tokens == [*ids("qa"), 300]
    assert texts.prompt("qabx").tokens == ids("qabx")
    assert texts.prompt("qabcx").tokens == [*ids("qa"), 300, *ids("x")]


def test_what_was_not_used_for_longest_goes_first_and_bytes_stay_within_the_bound() -> None:
    texts = cache(max_bytes=20_000)
    for number in range(200):
        assert texts.insert(f"{number:03}", [number], [-1.0], [1])
        texts.whole("000")
        assert texts.bytes <= 20_000
    assert 10 < len(texts) < 40
    assert texts.whole("000").loss_mask == [1] and texts.whole("199").loss_mask == [1]
    assert texts.whole("001").loss_mask == [0, 0, 0]
    assert not texts.insert("x" * 30_000, [1])


def test_what_old_weights_said_goes_when_newer_ones_speak() -> None:
    texts = cache(keep_versions=2)
    for version in range(5):
        texts.insert(f"text {version}", [version], [-1.0], [1], version)
    texts.insert("ageless", [9], [-1.0], [1])
    assert [texts.whole(f"text {version}").loss_mask == [1] for version in range(5)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert texts.newest_version == 4 and texts.whole("ageless").loss_mask == [1]


def _before(engine: Scripted, work: Callable[[Client], Coroutine[Any, Any, Any]]) -> Any:
    async def inside() -> Any:
        made = [lambda app, router: RadixTreeMiddleware(app, router=router)]
        async with serving(engine, middleware=made) as client:
            return await work(client)

    return asyncio.run(inside())


def _generate(text: str, **sampling: Any) -> dict[str, Any]:
    return {"text": text, "sampling_params": {"max_new_tokens": 8, **sampling}}


def test_turns_of_texts_are_answered_on_the_tokens_that_were_sampled() -> None:
    engine = Scripted("ab$")

    async def work(client: Client) -> list[Any]:
        first = await client.ok("/generate", _generate("q1 "))
        text = "q1 " + first["text"]
        found = await client.ok("/retrieve_from_text", {"text": text, "return_logp": True})
        bare = await client.ok("/retrieve_from_text", {"text": text})
        second = await client.ok("/generate", _generate(text + "<eos>q2 "))
        whole = text + "<eos>q2 " + second["text"]
        again = await client.ok("/retrieve_from_text", {"text": whole, "return_logp": True})
        return [found, bare, again]

    found, bare, again = _before(engine, work)
    turn = [*ids("ab"), EOS]
    assert found["tokens"] == [*ids("q1 "), *turn] and found["response"] == "q1 ab"
    assert found["loss_mask"] == [0, 0, 0, 1, 1, 1]
    assert found["rollout_logp"] == [0.0] * 3 + [-1 / 8, -2 / 8, -3 / 8]
    assert found["token_length"] == found["loss_mask_length"] == 6
    assert "rollout_logp" not in bare
    # The special token went to the engine as itself, not as the letters of its name.
    assert list(engine.requests[1].prompt_ids) == [*ids("q1 "), *turn, *ids("q2 ")]
    assert again["tokens"] == [*ids("q1 "), *turn, *ids("q2 "), *turn]
    assert again["loss_mask"] == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]


def test_a_prompt_of_ids_stays_as_it_is_and_keeps_what_was_sampled_of_it() -> None:
    engine = Scripted("ab$")

    async def work(client: Client) -> Any:
        body = {"input_ids": ids("q"), "sampling_params": {"max_new_tokens": 8}}
        first = await client.ok("/generate", body)
        longer = [*ids("q"), *first["output_ids"], *ids("r")]
        await client.ok("/generate", {**body, "input_ids": longer})
        return await client.ok("/retrieve_from_text", {"text": "qab<eos>rab", "return_logp": True})

    found = _before(engine, work)
    assert list(engine.requests[1].prompt_ids) == [*ids("qab"), EOS, *ids("r")]
    assert found["tokens"] == [*ids("qab"), EOS, *ids("rab"), EOS]
    assert found["loss_mask"] == [0, 1, 1, 1, 0, 1, 1, 1]


def test_other_requests_and_wrong_ones_are_answered_as_without_it() -> None:
    async def work(client: Client) -> None:
        many = await client.ok("/generate", _generate("x") | {"text": ["x", "y"]})
        assert [one["text"] for one in many] == ["abcdefgh"] * 2
        async with client.session.post(
            client.server.url + "/generate", json=_generate("x") | {"stream": True}
        ) as answer:
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        assert (await client.get("/health"))[0] == 200
        for body in (
            [],
            {"text": 3},
            {"text": ""},
            {"text": "a", "input_ids": [1]},
            {"text": None},
        ):
            await client.refused("/generate", body)
        wrong = await client.refused("/generate", _generate("x", max_new_token=4))
        assert "did you mean" in wrong["message"]
        await client.refused("/generate", {"text": "x", "sampling_params": 3})
        for body in ([], {}, {"text": ["a"]}, {"text": "a", "return_logp": "yes"}):
            await client.refused("/retrieve_from_text", body)
        found = await client.ok("/retrieve_from_text", {"text": "xabcdefgh"})
        assert found["loss_mask"] == [0] * 9

    _before(Scripted(), work)


@pytest.mark.parametrize("asked", [False, True])
def test_a_generation_that_an_engine_broke_off_is_made_again_unless_that_was_asked_for(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_middleware, "RETRY_S", 0.01)

    async def work() -> tuple[int, Any]:
        pool, engine = Pool(policy="round_robin"), HeldEngine(A, "vllm")
        pool.add(engine)
        server = RouterServer(
            Bridge(lambda: pool, Letters, model="some/model"),
            behind=Behind(pool, None),  # type: ignore[arg-type]
            middleware=[lambda app, router: RadixTreeMiddleware(app, router=router)],
        )
        await server.serve_here()
        tries = 0
        try:
            async with aiohttp.ClientSession() as session:
                client = Client(server, session)
                answer = asyncio.ensure_future(client.ok("/generate", _generate("q")))
                while not answer.done():
                    for one in list(engine.asked):
                        tries += 1
                        if asked:
                            await client.ok("/abort_request", {"abort_all": True})
                        elif tries < 3:
                            one.answer.set_result(result(one.request, finish=FinishReason.ABORT))
                        else:
                            one.finish("ab")
                        await asyncio.sleep(0.005)
                    await asyncio.sleep(0.001)
                return tries, await answer
        finally:
            await server.aclose()
            await pool.close()

    tries, answer = asyncio.run(work())
    assert tries == (1 if asked else 3)
    assert answer["meta_info"]["finish_reason"]["type"] == ("abort" if asked else "stop")
