"""The client of SGLang against what speaks as SGLang does: a server that checks every request
against SGLang's schema, and a real `dovetail serve`. Both have the model that an engine in this
process has.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.checkpoint import hf
from dovetail.checkpoint.hf_weights import read_weights
from dovetail.engines.embedded.engine import EmbeddedEngine
from dovetail.engines.launch import ClientSettings
from dovetail.engines.sglang.client import SglangEngine, make_client
from dovetail.types import FinishReason, GenerateRequest, ScoreRequest
from dovetail.types.calls import SamplingParams
from dovetail.types.errors import (
    EngineError,
    EngineGoneError,
    RequestRefusedError,
    RequestTooLongError,
)
from dovetail.types.ports import Engine, RemoteEngine, ScoringEngine
from dovetail.types.weights import Snapshot
from tests.loop.tiny import make_model
from tests.serve_process import serving
from tests.sglang_server import SglangServer

CONTEXT = 256
PROMPT = (5, 9, 14, 20, 7)
SERVERS = ("protocol", "serve")


@dataclass
class World:
    """Two models of one shape, and where one of them is served."""

    old: Path
    new: Path
    url: str
    serve_log: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    place = tmp_path_factory.mktemp("sglang")
    old = make_model(place / "old", initializer_range=0.3)
    new = make_model(place / "new", seed=1, initializer_range=0.3)
    flags = ("--dtype", "float32", "--engine-kv-tokens", "4096", "--num-threads", "1")
    with serving(old, *flags, log=place / "serve.log") as (url, _):
        yield World(old, new, url, place / "serve.log")


@pytest.fixture(params=SERVERS)
def which(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def engine_of(directory: Path) -> EmbeddedEngine:
    model, tokenizer = hf.load_model(directory, "float32"), hf.load_tokenizer(directory)
    return EmbeddedEngine(
        model,
        tokenizer,
        max_running=256,
        kv_tokens=4096,
        max_context_len=CONTEXT,
        eos_token_ids=hf.eos_token_ids(model, tokenizer),
    )


@asynccontextmanager
async def client_of(world: World, which: str) -> AsyncIterator[SglangEngine]:
    settings = ClientSettings(
        max_context_len=CONTEXT,
        vocab_size=80,
        eos_token_ids=(1,),
        tokenizer=hf.load_tokenizer(world.old),
        request_timeout_s=60.0,
    )
    if which == "protocol":
        engine = engine_of(world.old)
        server = SglangServer(
            engine,
            context_len=CONTEXT,
            read_weights=lambda path: read_weights(path, engine._model, "Cure"),
        )
        async with server:
            client = make_client(server.url, settings)
            try:
                yield client
            finally:
                await client.close()
                assert server.violations == []
        return
    client = make_client(world.url, settings)
    try:
        yield client
    finally:
        # Others come after.
        await client.wake()
        await client.resume()
        await client.load_snapshot(Snapshot(0, world.old, 1))
        await client.close()


def asked(name: str, **changes: Any) -> GenerateRequest:
    sampling = {"max_new_tokens": 24, "seed": 3, **changes.pop("sampling", {})}
    return GenerateRequest(name, PROMPT, SamplingParams(**sampling), **changes)


SAMPLINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.8, "min_p": 0.02},
    {"ignore_eos": True, "max_new_tokens": 60},
    {"min_new_tokens": 20, "max_new_tokens": 60},
    {"stop": ("a", "7"), "max_new_tokens": 200},
    {"stop_token_ids": (30, 31, 32), "skip_special_tokens": True, "max_new_tokens": 200},
    {"max_new_tokens": 0},
]


def test_it_is_a_remote_engine_that_scores() -> None:
    client = make_client("http://127.0.0.1:1/", ClientSettings(max_context_len=CONTEXT))
    assert isinstance(client, RemoteEngine | Engine) and isinstance(client, ScoringEngine)
    assert (client.url, client.dialect) == ("http://127.0.0.1:1", "sglang")


def test_it_generates_what_the_engine_in_this_process_generates(world: World, which: str) -> None:
    requests = [
        asked(f"{i}.{seed}", sampling={"seed": seed, **sampling})
        for i, sampling in enumerate(SAMPLINGS)
        for seed in (0, 2**63 - 1)
    ]

    async def work() -> tuple[list[Any], list[Any]]:
        own = engine_of(world.old)
        async with client_of(world, which) as client:
            there = await asyncio.gather(*(client.generate(one) for one in requests))
        here = await asyncio.gather(*(own.generate(one) for one in requests))
        await own.close()
        return here, there

    for one, other in zip(*asyncio.run(work()), strict=True):
        assert other.token_ids == one.token_ids
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert (other.finish_reason, other.text) == (one.finish_reason, one.text)
        assert other.request_id == one.request_id
        assert (other.version_spans, other.prompt_tokens) == (one.version_spans, one.prompt_tokens)


def test_a_continued_response_goes_on_with_its_draws(world: World, which: str) -> None:
    async def work() -> None:
        async with client_of(world, which) as client:
            whole = await client.generate(asked("w", sampling={"ignore_eos": True}))
            rest = dataclasses.replace(
                asked("r", sampling={"ignore_eos": True, "max_new_tokens": 14}),
                prompt_ids=(*PROMPT, *whole.token_ids[:10]),
                num_generated=10,
            )
            assert (await client.generate(rest)).token_ids == whole.token_ids[10:]

    asyncio.run(work())


def test_a_stop_string_that_begins_in_an_earlier_part_ends_the_response(
    world: World, which: str
) -> None:
    async def work() -> None:
        async with client_of(world, which) as client:
            whole = await client.generate(asked("w", sampling={"ignore_eos": True}))
            text = whole.text
            stop = text[9:12]
            assert text.find(stop) == 9, "the seed of this test has to be another one"
            rest = dataclasses.replace(
                asked("r", sampling={"ignore_eos": True, "stop": (stop,), "max_new_tokens": 14}),
                prompt_ids=(*PROMPT, *whole.token_ids[:10]),
                num_generated=10,
            )
            found = await client.generate(rest)
            assert found.token_ids == whole.token_ids[10:12]
            assert (found.finish_reason, found.text) == (FinishReason.STOP, text[10:12])

    asyncio.run(work())


def test_an_abort_keeps_the_tokens_there_are(world: World, which: str) -> None:
    async def work() -> None:
        own = engine_of(world.old)
        long = {"ignore_eos": True, "max_new_tokens": 240}
        whole = await own.generate(asked("whole", sampling=long))
        await own.close()
        async with client_of(world, which) as client:
            names = ("one", "one1", "two")
            tasks = {
                n: asyncio.ensure_future(client.generate(asked(n, sampling=long))) for n in names
            }
            await asyncio.sleep(0.03)
            await client.abort(["one"])
            assert tasks["one"].done() and not tasks["two"].done()
            await client.abort()
            results = await asyncio.gather(*tasks.values())
            assert {r.finish_reason for r in results} <= {FinishReason.ABORT, FinishReason.LENGTH}
            assert results[0].finish_reason is FinishReason.ABORT
            for result in results:
                count = len(result.token_ids)
                assert result.token_ids == whole.token_ids[:count] and count < 240
                assert len(result.logprobs) == count
            await client.abort(["nobody"])

    asyncio.run(work())


def test_a_request_that_is_aborted_as_soon_as_it_is_made_ends(world: World, which: str) -> None:
    async def work() -> None:
        async with client_of(world, which) as client:
            task = asyncio.ensure_future(
                client.generate(asked("x", sampling={"ignore_eos": True, "max_new_tokens": 240}))
            )
            await asyncio.sleep(0)
            await client.abort()
            assert (await task).finish_reason is FinishReason.ABORT

    asyncio.run(work())


def test_weights_that_change_under_a_request_show_in_its_spans(world: World, which: str) -> None:
    async def work() -> Any:
        async with client_of(world, which) as client:
            task = asyncio.ensure_future(
                client.generate(asked("x", sampling={"ignore_eos": True, "max_new_tokens": 240}))
            )
            await asyncio.sleep(0.06)
            await client.pause()
            await client.load_snapshot(Snapshot(5, world.new, 1))
            assert await client.weight_version() == 5
            await client.resume()
            return await task

    result = asyncio.run(work())
    first, second = result.version_spans
    assert (first.weight_version, second.weight_version) == (0, 5)
    assert (first.start, second.end) == (0, len(result.token_ids)) and first.end == second.start
    for span, directory in ((first, world.old), (second, world.new)):
        wanted = plain_logprobs(directory, (*PROMPT, *result.token_ids))[len(PROMPT) - 1 :]
        assert result.logprobs[span.start : span.end] == pytest.approx(
            wanted[span.start : span.end], abs=1e-3
        )


def plain_logprobs(directory: Path, ids: tuple[int, ...]) -> list[float]:
    """Of all tokens but the first, by one forward."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = hf.load_model(directory, "float32")(tokens, use_cache=False).logits[0]
    chosen = torch.log_softmax(logits[:-1].float(), -1).gather(1, tokens[0, 1:, None])
    return chosen[:, 0].tolist()  # type: ignore[no-any-return]


def test_after_an_update_greedy_tokens_are_those_of_the_new_model(world: World, which: str) -> None:
    async def work() -> None:
        new = engine_of(world.new)
        wanted = await new.generate(asked("n", sampling={"temperature": 0.0}))
        await new.close()
        async with client_of(world, which) as client:
            before = await client.generate(asked("a", sampling={"temperature": 0.0}))
            await client.load_snapshot(Snapshot(9, world.new, 1))
            after = await client.generate(asked("b", sampling={"temperature": 0.0}))
            assert after.token_ids == wanted.token_ids != before.token_ids
            assert [span.weight_version for span in after.version_spans] == [9]

    asyncio.run(work())


def test_nothing_is_made_while_it_is_paused(world: World, which: str) -> None:
    async def work() -> None:
        async with client_of(world, which) as client:
            await client.pause()
            assert await client.healthy(10.0)
            task = asyncio.ensure_future(client.generate(asked("p")))
            await asyncio.sleep(0.3)
            assert not task.done()
            await client.resume()
            assert (await task).finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            assert await client.healthy(30.0)

    asyncio.run(work())


def test_it_scores_what_the_engine_in_this_process_scores(world: World, which: str) -> None:
    ids = (*PROMPT, 33, 34, 35, 36)
    requests = [ScoreRequest("a", ids), ScoreRequest("b", ids, start=4, top=3)]
    requests += [ScoreRequest("c", ids, start=len(ids)), ScoreRequest("d", ids[:2])]

    async def work() -> tuple[list[Any], list[Any]]:
        own = engine_of(world.old)
        async with client_of(world, which) as client:
            there = [await client.score(one) for one in requests]
            with pytest.raises(RequestRefusedError, match="temperature 1 only"):
                await client.score(ScoreRequest("t", ids, temperature=0.5))
        here = [await own.score(one) for one in requests]
        await own.close()
        return here, there

    for one, other in zip(*asyncio.run(work()), strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert [[t for t, _ in place] for place in other.top] == [
            [t for t, _ in place] for place in one.top
        ]
        for places in zip(one.top, other.top, strict=True):
            here, there = ([v for _, v in place] for place in places)
            assert there == pytest.approx(here, abs=1e-4)
        assert other.weight_version == one.weight_version


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (
            asked("l", sampling={"max_new_tokens": 252}),
            RequestTooLongError,
            "5 .*=252 = 257 .* 256",
        ),
        (dataclasses.replace(asked("i"), prompt_ids=()), RequestRefusedError, "got 0"),
        (dataclasses.replace(asked("i"), prompt_ids=(3, 80)), RequestRefusedError, "from 3 to 80"),
        (dataclasses.replace(asked("i"), prompt_ids=(-1,)), RequestRefusedError, "from -1 to -1"),
        (asked("n", num_generated=6), RequestRefusedError, "num_generated=6 of 5"),
        (asked("m", media=object()), RequestRefusedError, "has images"),
        (asked("s", sampling={"stop": tuple("abcdefgh" * 5)}), RequestRefusedError, "takes 32"),
        (asked("e", return_routed_experts=True), RequestRefusedError, "experts"),
    ],
    ids=lambda value: value.request_id if isinstance(value, GenerateRequest) else "",
)
def test_what_it_can_not_do_is_said_before_or_by_the_server(
    world: World, which: str, request_: GenerateRequest, error: type[EngineError], says: str
) -> None:
    async def work() -> None:
        async with client_of(world, which) as client:
            with pytest.raises(error, match=says) as found:
                await client.generate(request_)
            assert not isinstance(found.value, EngineGoneError)
            assert (await client.generate(asked("after"))).token_ids

    asyncio.run(work())


def test_it_sleeps_and_wakes(world: World, which: str) -> None:
    async def work() -> None:
        async with client_of(world, which) as client:
            before = await client.generate(asked("a"))
            await client.sleep()
            assert await client.healthy(10.0)
            await client.wake()
            await client.load_snapshot(Snapshot(1, world.old, 1))
            assert (await client.generate(asked("a"))).token_ids == before.token_ids

    asyncio.run(work())


def test_one_name_may_be_asked_twice_at_once(world: World, which: str) -> None:
    async def work() -> None:
        async with client_of(world, which) as client:
            one, two = await asyncio.gather(*(client.generate(asked("same")) for _ in range(2)))
            assert one.token_ids == two.token_ids

    asyncio.run(work())


def test_a_closed_client_says_so(world: World, which: str) -> None:
    async def work() -> None:
        async with client_of(world, which) as client:
            task = asyncio.ensure_future(
                client.generate(asked("c", sampling={"ignore_eos": True, "max_new_tokens": 240}))
            )
            await asyncio.sleep(0.02)
            other = make_client(client.url, ClientSettings(max_context_len=CONTEXT))
            await other.close()
            with pytest.raises(EngineError, match="closed"):
                await other.generate(asked("d"))
            await client.abort()
            assert (await task).finish_reason is FinishReason.ABORT

    asyncio.run(work())


def test_a_server_that_is_gone_is_gone(world: World) -> None:
    async def work() -> None:
        client = make_client("http://127.0.0.1:1", ClientSettings(max_context_len=CONTEXT))
        for asking in (
            client.generate(asked("g")),
            client.score(ScoreRequest("s", (1, 2))),
            client.weight_version(),
            client.pause(),
            client.load_snapshot(Snapshot(1, world.new, 1)),
        ):
            with pytest.raises(EngineGoneError):
                await asking
        assert not await client.healthy(1.0)
        await client.close()

    asyncio.run(work())
