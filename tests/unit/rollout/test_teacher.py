"""A teacher behind real HTTP: what it is asked, how faults are met, and what is never said."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from dovetail.config.sections import DistillationConfig
from dovetail.rollout import teacher as module
from dovetail.rollout.teacher import Lessons, TeacherClient
from dovetail.types import ConfigError, RolloutError, Sample

VOCAB = 50
Reply = Callable[[dict[str, Any]], Any]


def logprob(token: int, place: int) -> float:
    return -(token + place / 8)


def sglang(body: dict[str, Any]) -> Any:
    ids, start = body["input_ids"], body["logprob_start_len"]
    entries = [[logprob(token, place), token, None] for place, token in enumerate(ids)][start:]
    entries[0][0] = None
    return {"text": "", "meta_info": {"input_token_logprobs": entries}}


def vllm(body: dict[str, Any]) -> Any:
    ids = body["prompt"]
    entries = [
        None if place == 0 else {str(token): {"logprob": logprob(token, place)}, "99": {}}
        for place, token in enumerate(ids)
    ]
    return {"choices": [{"text": "x", "prompt_logprobs": entries}]}


class Server:
    """Answers with `reply`; before that with each status of `faults`, once."""

    def __init__(self, reply: Reply = sglang, faults: tuple[int, ...] = ()) -> None:
        self.reply, self.faults = reply, list(faults)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most = 0
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.faults:
            text = f"no: {request.headers.get('Authorization', '')}"
            return web.Response(status=self.faults.pop(0), text=text)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.01)
        self.under_way -= 1
        reply = self.reply(body)
        if isinstance(reply, str):
            return web.Response(text=reply)
        return web.json_response(reply)


@asynccontextmanager
async def serving(*servers: Server) -> AsyncIterator[list[str]]:
    runners = []
    for server in servers:
        app = web.Application()
        app.router.add_post("/{path:.*}", server.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        runners.append(runner)
    try:
        yield [server.url for server in servers]
    finally:
        for runner in runners:
            await runner.cleanup()


def sample(index: int, prompt: int = 3, response: int = 4, **more: Any) -> Sample:
    tokens = [(7 * index + place) % VOCAB for place in range(prompt + response)]
    return Sample(index=index, tokens=tokens, response_length=response, **more)


def expected(one: Sample) -> list[float]:
    start = len(one.tokens) - one.response_length
    return [logprob(token, place) for place, token in enumerate(one.tokens)][start:]


def client(urls: list[str], **settings: Any) -> TeacherClient:
    token = settings.pop("token", None)
    config = DistillationConfig(
        opd_teacher_urls=urls,
        **{"opd_teacher_timeout_s": 2.0, "opd_teacher_retries": 2, **settings},
    )
    return TeacherClient(config, vocab_size=VOCAB, token=token)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.01)


def taught(
    samples: list[Sample], *servers: Server, **settings: Any
) -> tuple[TeacherClient, dict[str, float]]:
    async def work() -> tuple[TeacherClient, dict[str, float]]:
        async with serving(*servers) as urls:
            own = client(urls, **settings)
            try:
                await own.teach(samples)
                return own, own.metrics()
            finally:
                await own.close()

    return asyncio.run(work())


@pytest.mark.parametrize(("kind", "reply"), [("sglang", sglang), ("vllm", vllm)])
def test_every_sample_gets_the_logprobs_of_its_response(kind: str, reply: Reply) -> None:
    samples = [sample(i, prompt=1 + i % 3, response=i) for i in range(9)]
    server = Server(reply)
    _, metrics = taught(samples, server, opd_type=kind)
    for one in samples:
        assert one.teacher_log_probs == expected(one)
    # The one without a response is not asked about.
    assert metrics["opd/teacher_requests"] == len(server.bodies) == 8
    assert metrics["opd/teacher_retries"] == 0 and metrics["opd/teacher_s"] > 0


def test_what_is_asked_is_what_the_servers_take() -> None:
    one = sample(1)
    server = Server()
    taught([one], server)
    assert server.bodies == [
        {
            "input_ids": one.tokens,
            "sampling_params": {
                "max_new_tokens": 0,
                "temperature": 0,
                "skip_special_tokens": False,
            },
            "return_logprob": True,
            "logprob_start_len": 2,
        }
    ]
    server = Server(vllm)
    taught([sample(1)], server, opd_type="vllm", opd_teacher_model="big")
    assert server.bodies == [
        {
            "model": "big",
            "prompt": one.tokens,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 1,
            "add_special_tokens": False,
        }
    ]


def test_a_sample_is_asked_about_once_and_again_when_its_response_has_grown() -> None:
    known = sample(1, teacher_log_probs=[-1.0] * 4)
    grown = sample(2, teacher_log_probs=[-1.0] * 3)
    server = Server()
    taught([known, grown], server)
    assert known.teacher_log_probs == [-1.0] * 4
    assert grown.teacher_log_probs == expected(grown)
    assert len(server.bodies) == 1


def test_a_sequence_without_a_prompt_says_nothing_of_its_first_token() -> None:
    one, bare = sample(1, prompt=0, response=3), sample(2, prompt=0, response=1)
    taught([one, bare], Server())
    assert one.teacher_log_probs == [0.0, *expected(one)[1:]]
    assert bare.teacher_log_probs == [0.0]


def test_servers_share_the_work_and_no_more_than_allowed_is_under_way() -> None:
    servers = [Server(), Server(), Server()]
    taught([sample(i) for i in range(30)], *servers, opd_teacher_concurrency=6)
    assert [len(server.bodies) for server in servers] == [10, 10, 10]
    assert sum(server.most for server in servers) <= 6


def test_a_fault_that_may_pass_is_met_by_another_try() -> None:
    one, server = sample(1), Server(faults=(503, 429))
    _, metrics = taught([one], server)
    assert one.teacher_log_probs == expected(one)
    assert metrics["opd/teacher_retries"] == 2 and metrics["opd/teacher_requests"] == 3


def test_another_server_takes_over_from_one_that_fails() -> None:
    bad, good = Server(faults=(500,) * 99), Server()
    samples = [sample(i) for i in range(12)]
    taught(samples, bad, good, opd_teacher_concurrency=2)
    assert all(one.teacher_log_probs == expected(one) for one in samples)
    assert len(bad.bodies) <= 2


def test_tries_come_to_an_end_and_the_error_says_what_was_last() -> None:
    with pytest.raises(RolloutError) as caught:
        taught([sample(5)], Server(faults=(500,) * 99))
    said = str(caught.value)
    assert said.startswith("sample 5: the teacher (--opd-teacher-urls (TOML:")
    assert "in 3 tries" in said and "status 500" in said and "--opd-teacher-retries" in said


def test_a_server_that_hangs_or_talks_nonsense_is_tried_again() -> None:
    with pytest.raises(RolloutError, match="what is not JSON"):
        taught([sample(5)], Server(lambda body: "<html>"))
    with pytest.raises(RolloutError, match="ClientConnectorError"):
        asyncio.run(_taught_by("http://127.0.0.1:9"))

    async def hangs() -> None:
        async with _silent() as url:
            with pytest.raises(RolloutError, match=r"no answer within 0.05 s"):
                await _taught_by(url, opd_teacher_timeout_s=0.05, opd_teacher_retries=1)

    asyncio.run(hangs())


async def _taught_by(url: str, **settings: Any) -> None:
    own = client([url], **settings)
    try:
        await own.teach([sample(5)])
    finally:
        await own.close()


@asynccontextmanager
async def _silent() -> AsyncIterator[str]:
    """Takes connections and says nothing."""

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def _other_ids(body: dict[str, Any]) -> Any:
    answer = sglang(body)
    for entry in answer["meta_info"]["input_token_logprobs"]:
        entry[1] += 1
    return answer


def _short(body: dict[str, Any]) -> Any:
    answer = sglang(body)
    del answer["meta_info"]["input_token_logprobs"][:3]
    return answer


def _nan(body: dict[str, Any]) -> Any:
    answer = sglang(body)
    answer["meta_info"]["input_token_logprobs"][-1][0] = float("nan")
    return answer


def _missing(body: dict[str, Any]) -> Any:
    answer = vllm(body)
    answer["choices"][0]["prompt_logprobs"][-1] = {"3": {"logprob": -1.0}}
    return answer


@pytest.mark.parametrize(
    ("kind", "reply", "said"),
    [
        ("sglang", _other_ids, "the teacher reads another vocabulary"),
        ("sglang", _short, "it tells of 2 tokens, expected 4"),
        ("sglang", _nan, "nan is no logprob"),
        ("sglang", lambda body: {"meta_info": {}}, "no meta_info.input_token_logprobs"),
        ("sglang", lambda body: [1], "no meta_info.input_token_logprobs"),
        ("vllm", _missing, "it tells nothing of token 13"),
        ("vllm", lambda body: {"choices": []}, "no choices"),
        ("vllm", lambda body: {"choices": [{"prompt_logprobs": [None]}]}, "of 1 tokens, 7 were"),
    ],
)
def test_an_answer_about_other_tokens_ends_the_run_at_once(
    kind: str, reply: Reply, said: str
) -> None:
    server = Server(reply)
    with pytest.raises(RolloutError, match="sample 1: the answer of the teacher at") as caught:
        taught([sample(1)], server, opd_type=kind)
    assert said in str(caught.value)
    assert len(server.bodies) == 1


def test_sglang_calls_the_last_token_of_its_vocabulary_zero() -> None:
    def clipped(body: dict[str, Any]) -> Any:
        answer = sglang(body)
        for entry in answer["meta_info"]["input_token_logprobs"]:
            entry[1] = entry[1] if entry[1] < VOCAB - 1 else 0
        return answer

    one = sample(1)
    one.tokens[-2] = VOCAB - 1
    taught([one], Server(clipped))
    assert one.teacher_log_probs == expected(one)


def test_the_token_goes_with_every_request_and_into_no_message() -> None:
    server = Server(faults=(503, 401))
    with pytest.raises(RolloutError, match="status 401") as caught:
        taught([sample(1)], server, token="s3cret")
    assert [one["Authorization"] for one in server.headers] == ["Bearer s3cret"] * 2
    assert "s3cret" not in str(caught.value) and "***" in str(caught.value)
    settings = DistillationConfig(opd_teacher_urls=["http://h:1"], opd_teacher_token_env="KEY")
    TeacherClient.from_config(settings, VOCAB, {"KEY": "s3cret"})
    with pytest.raises(ConfigError, match=r"environment variable KEY of --opd-teacher-token-env"):
        TeacherClient.from_config(settings, VOCAB, {})


def test_a_redirect_is_not_followed() -> None:
    with pytest.raises(RolloutError, match="status 302"):
        taught([sample(1)], Server(faults=(302,)))


def test_images_are_refused() -> None:
    with pytest.raises(RolloutError, match=r"sample 3 has images.*--opd-teacher-load"):
        taught([sample(3, multimodal_inputs={"images": [1]})], Server())


def test_at_the_start_a_teacher_has_to_answer_and_to_know_the_tokens() -> None:
    async def checked(server: Server, **settings: Any) -> None:
        async with serving(server) as urls:
            await client(urls, **settings).check()

    server = Server()
    asyncio.run(checked(server))
    assert server.bodies[0]["input_ids"] == [0, VOCAB - 1]
    asyncio.run(checked(Server(faults=(503, 503))))
    with pytest.raises(ConfigError, match=r"does not answer: .*status 503"):
        asyncio.run(checked(Server(faults=(503,) * 3)))
    with pytest.raises(ConfigError, match=r"can't score the policy's tokens, ids 0 to 49.*400"):
        asyncio.run(checked(Server(faults=(400,))))
    with pytest.raises(ConfigError, match=r"127.0.0.1:9/generate.*does not answer"):
        asyncio.run(client(["http://127.0.0.1:9"]).check())


def test_an_address_may_name_its_path() -> None:
    async def work() -> None:
        server = Server()
        paths: Counter[str] = Counter()
        reply = server.handle

        async def handle(request: web.Request) -> web.Response:
            paths[request.path] += 1
            return await reply(request)

        server.handle = handle  # type: ignore[method-assign]
        async with serving(server) as (url,):
            for one in (url, f"{url}/", f"{url}/generate", f"{url}/teacher/generate"):
                own = client([one])
                await own.teach([sample(1)])
                await own.close()
        assert paths == {"/generate": 3, "/teacher/generate": 1}

    asyncio.run(work())


def test_lessons_begin_with_each_group_and_end_together() -> None:
    async def work() -> None:
        server = Server()
        groups = [[sample(2 * i), sample(2 * i + 1)] for i in range(3)]
        async with serving(server) as urls:
            own = client(urls)
            lessons = Lessons(own)
            for group in groups:
                lessons.begin(group)
            await lessons.end()
            assert all(one.teacher_log_probs == expected(one) for g in groups for one in g)
            unasked = Lessons(own)
            unasked.begin([sample(99)])
            await unasked.cancel()
            await own.close()
        none = Lessons(None)
        none.begin(groups[0])
        await none.end()

    asyncio.run(work())
