"""Agents in sessions of their own: every way in which one runs, fails, or is cut off."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openai import AsyncOpenAI, AuthenticationError

from dovetail.compat.modules.session_tracer import OpenAIEndpointTracer
from dovetail.config.run import RunConfig
from dovetail.config.sections import RouterConfig
from dovetail.hooks import ArgsView
from dovetail.rollout import session
from dovetail.rollout.group import GroupRunner
from dovetail.router.bridge import Bridge
from dovetail.router.security import Access
from dovetail.router.server import RouterServer
from dovetail.router.sessions.server import SERVED, SessionServer, SessionSettings
from dovetail.types import ConfigError, GenerateCall, HookRunError, Sample, SamplingParams
from tests.unit.router.talking import DROPS_THOUGHTS, END, Talker

PROMPT = [{"role": "user", "content": "hello"}]
HEAD = """
import asyncio, time
from openai import AsyncOpenAI, OpenAI

def client(base_url):
    return AsyncOpenAI(base_url=base_url, api_key="anything", max_retries=0)

async def talk(base_url, prompt, kwargs, turns=2):
    messages = list(prompt)
    for _ in range(turns):
        done = await client(base_url).chat.completions.create(
            model="m", messages=messages, **kwargs
        )
        messages.append(done.choices[0].message.model_dump(exclude_none=True))
        messages.append({"role": "user", "content": "and?"})
    return messages
"""
ASYNC = """
async def agent(base_url, prompt, request_kwargs, metadata):
    messages = await talk(base_url, prompt, request_kwargs)
    return {"said": messages[-2]["content"], "of": metadata["row"]}
"""
PLAIN = """
def agent(base_url, prompt, request_kwargs, **more):
    done = OpenAI(base_url=base_url + "/v1", api_key="x").chat.completions.create(
        model="m", messages=prompt, stream=True, **request_kwargs
    )
    return {"said": "".join(chunk.choices[0].delta.content or "" for chunk in done)}
"""
CLASS = """
class agent:
    async def __call__(self, base_url, prompt, **more):
        self.runs = getattr(self, "runs", 0) + 1
        await talk(base_url, prompt, {}, turns=1)
        return {"said": "one", "runs": self.runs}
"""
RAISES_LATE = """
async def agent(base_url, prompt, request_kwargs, metadata):
    await talk(base_url, prompt, {}, turns=1)
    raise ValueError("the tool broke")
"""
RAISES_EARLY = """
async def agent(base_url):
    raise ValueError("no tool")
"""
SILENT = """
async def agent(base_url):
    return None
"""
ODD = """
async def agent(base_url, prompt):
    await talk(base_url, prompt, {}, turns=1)
    return 3
"""
HANGS = """
async def agent(base_url, prompt):
    await talk(base_url, prompt, {}, turns=1)
    await asyncio.sleep(60)

async def abort(args):
    args.aborts = getattr(args, "aborts", 0) + 1
"""
HANGS_PLAIN = """
def agent(base_url, prompt):
    OpenAI(base_url=base_url, api_key="x").chat.completions.create(model="m", messages=prompt)
    time.sleep(60)
"""


@asynccontextmanager
async def agents(
    lines: list[str],
    source: str,
    path: Path,
    template: str | None = None,
    access: Access | None = None,
    **config: Any,
) -> AsyncIterator[SimpleNamespace]:
    """A talker behind a real server, and `args` of a run with an agent."""
    file = path / "their_agent.py"
    file.write_text(HEAD + source)
    talker = Talker(lines) if template is None else Talker(lines, template=template)
    bridge = Bridge(lambda: talker, lambda: talker.tokenizer, model="m")
    sessions = SessionServer(bridge, SessionSettings())
    server = RouterServer(bridge, access=access, routes=sessions.routes())
    server.start(asyncio.get_running_loop())
    SERVED[f"{server.host}:{server.port}"] = sessions
    hooks = {"custom_agent_function_path": f"{file}:agent", **config.pop("hooks", {})}
    args = ArgsView(RunConfig.model_validate({"hooks": hooks, "session": config}))
    args.learn(session_server_ip=server.host, session_server_port=server.port)
    try:
        yield SimpleNamespace(talker=talker, sessions=sessions, args=args, url=server.url)
    finally:
        await asyncio.to_thread(server.close)
        session._BOUND.clear()


def call_of(world: SimpleNamespace, **more: Any) -> GenerateCall:
    sample = Sample(index=3, group_index=1, prompt=PROMPT, metadata={"row": 5})
    return GenerateCall(
        sample=sample,
        sampling=SamplingParams(max_new_tokens=50, seed=9),
        engine=world.talker,
        tokenizer=world.talker.tokenizer,
        default=None,  # type: ignore[arg-type]
        args=world.args,
        **more,
    )


def run(lines: list[str], source: str, path: Path, **config: Any) -> tuple[list[Sample], Any]:
    """The samples of one agent's run."""

    async def work() -> tuple[list[Sample], Any]:
        async with agents(lines, source, path, **config) as world:
            made = await session.generate(call_of(world))
            assert len(world.sessions.store) == 0
            return made, world.talker

    return asyncio.run(work())


def test_an_agent_is_trained_on_what_it_sampled_and_tells_what_came_of_it(tmp_path: Path) -> None:
    (sample,), talker = run([f"one{END}", f"two oops{END}"], ASYNC, tmp_path)
    assert sample.metadata["said"] == "two oops" and sample.metadata["of"] == 5
    ids = [one for result in talker.results for one in result.token_ids]
    logprobs = [one for result in talker.results for one in result.logprobs]
    response = sample.tokens[sample.prompt_length :]
    masks = sample.loss_mask or []
    assert [one for one, mask in zip(response, masks, strict=True) if mask] == ids
    known = zip(sample.rollout_log_probs or [], masks, strict=True)
    assert [one for one, mask in known if mask] == logprobs
    assert sample.status is Sample.Status.COMPLETED and (sample.index, sample.group_index) == (3, 1)
    assert sample.session_id == talker.requests[0].session_id
    assert sample.non_generation_time >= 0.0
    # Equal seeds would draw alike in every turn.
    assert len({request.sampling.seed for request in talker.requests}) == 2


@pytest.mark.parametrize("source", [PLAIN, CLASS], ids=["a plain function", "a class"])
def test_agents_may_be_plain_functions_and_classes(source: str, tmp_path: Path) -> None:
    (sample,), _ = run([f"one{END}"], source, tmp_path)
    assert sample.metadata["said"] == "one" and sample.metadata.get("runs", 1) == 1


def test_what_was_recorded_before_an_agent_raised_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (sample,), _ = run([f"one{END}"], RAISES_LATE, tmp_path)
    assert sample.response == f"one{END}"
    assert sample.metadata["agent_error"] == "ValueError: the tool broke"
    assert "the tool broke; the 1 turns until then are kept" in caplog.text


def test_an_agent_that_has_nothing_to_train_on_raises(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("early", "silent", "odd")]
    for place in places:
        place.mkdir()
    with pytest.raises(ValueError, match="no tool"):
        run([END], RAISES_EARLY, places[0])
    with pytest.raises(RuntimeError, match="made no request that was answered"):
        run([END], SILENT, places[1])
    with pytest.raises(HookRunError, match=r"gave back int .* expected a dict"):
        run([END], ODD, places[2])


@pytest.mark.parametrize("source", [HANGS, HANGS_PLAIN], ids=["async", "in a thread"])
def test_an_agent_whose_time_is_over_is_truncated(source: str, tmp_path: Path) -> None:
    (sample,), _ = run([f"one{END}"], source, tmp_path, agent_timeout_s=1.0)
    assert sample.status is Sample.Status.TRUNCATED and sample.response == f"one{END}"
    assert "agent did not return within 1 s" in sample.metadata["agent_error"]
    assert "--agent-timeout-s" in sample.metadata["agent_error"]


def test_a_step_that_is_over_ends_its_agents_and_tells_their_module_once(tmp_path: Path) -> None:
    over = asyncio.Event()

    async def work() -> None:
        async with agents([f"one{END}"], HANGS, tmp_path) as world:
            calls = [call_of(world, is_aborted=over.is_set) for _ in range(3)]
            running = [asyncio.create_task(session.generate(call)) for call in calls]
            while len(world.talker.results) < 3:
                await asyncio.sleep(0.01)
            over.set()
            for (sample,), call in zip(await asyncio.gather(*running), calls, strict=True):
                assert sample is call.sample and sample.status is Sample.Status.ABORTED
                assert sample.response_length == 0
            assert len(world.sessions.store) == 0
            await asyncio.sleep(0)
            assert world.args.aborts == 1

    asyncio.run(work())


def test_an_agent_that_fails_because_its_step_is_over_is_no_matter_for_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with agents([f"one{END}"], ASYNC, tmp_path) as world:
            world.talker.aborts = True
            (sample,) = await session.generate(call_of(world))
            assert sample.status is Sample.Status.ABORTED
        gc.collect()

    asyncio.run(work())
    # Clients that other agents left open may have something to say, too.
    assert not [one for one in caplog.records if "was aborted" in one.getMessage()]


def test_an_aborted_engine_and_a_cancelled_call_end_the_session(tmp_path: Path) -> None:
    async def work() -> None:
        async with agents([f"one{END}"], ASYNC, tmp_path) as world:
            world.talker.aborts = True
            (sample,) = await session.generate(call_of(world))
            assert sample.status is Sample.Status.ABORTED
            world.talker.aborts, world.talker.held = False, asyncio.Event()
            asked = len(world.talker.requests)
            running = asyncio.create_task(session.generate(call_of(world)))
            while len(world.talker.requests) == asked:
                await asyncio.sleep(0.01)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert len(world.sessions.store) == 0
            while not world.talker.cancelled:
                await asyncio.sleep(0.01)

    asyncio.run(work())


def test_samples_of_one_session_are_one_rollout_with_one_reward(tmp_path: Path) -> None:
    lines = [f"<think>hm</think>one{END}", f"<think>ah</think>two{END}"]
    scored: list[str] = []

    class Scorer:
        async def score(self, sample: Sample) -> None:
            scored.append(sample.response)
            sample.reward = 0.5

        async def score_group(self, samples: list[Sample]) -> None:
            raise AssertionError

    async def work() -> list[Sample]:
        async with agents(lines, ASYNC, tmp_path, template=DROPS_THOUGHTS) as world:

            async def generate(call: GenerateCall) -> list[Sample]:
                return await session.generate(call_of(world))

            runner = GroupRunner(world.talker, world.talker.tokenizer, Scorer(), generate)
            group = [Sample(index=3, group_index=1, prompt=PROMPT)]
            return await runner.run(group, SamplingParams(), 0)

    first, second = asyncio.run(work())
    assert scored == [lines[1]] and (first.reward, second.reward) == (0.5, 0.5)
    assert first.rollout_id == second.rollout_id == 3
    assert first.response == lines[0] and 0 not in (second.loss_mask or [])
    assert first.metadata["strand"] == {"number": 0, "of": 2}


def test_a_generate_function_of_the_users_may_open_a_session_itself(tmp_path: Path) -> None:
    async def work() -> None:
        async with agents([f"one{END}"], SILENT, tmp_path) as world:
            call = call_of(world)
            tracer = await OpenAIEndpointTracer.create(
                world.args, sampling_params=call.sampling_params
            )
            assert tracer.base_url.startswith(world.url + "/sessions/")
            client = AsyncOpenAI(base_url=f"{tracer.base_url}/v1", api_key="x")
            await client.chat.completions.create(model="m", messages=PROMPT, temperature=0.1)
            assert world.talker.requests[0].sampling.temperature == 1.0
            reply = await tracer.collect_samples(call.sample, max_seq_len=1000)
            assert reply.samples == [call.sample] and call.sample.response == f"one{END}"
            again = await tracer.collect_samples(call.sample)
            assert again.samples == [] and again.empty_reason == "no_records"

    asyncio.run(work())


def test_a_run_without_sessions_or_agent_says_so(tmp_path: Path) -> None:
    async def work() -> None:
        async with agents([END], SILENT, tmp_path) as world:
            world.args.custom_agent_function_path = None
            with pytest.raises(ConfigError, match="custom-agent-function-path"):
                await session.generate(call_of(world))
            world.args.session_server_port = 1
            with pytest.raises(ConfigError, match="serve-router"):
                await session.generate(call_of(world))

    asyncio.run(work())


def test_request_kwargs_are_keywords_of_the_openai_client() -> None:
    given = {"max_new_tokens": 7, "temperature": 0.5, "stop": ["a"], "sampling_seed": 3, "top_k": 4}
    made = session.build_chat_request_kwargs(given)
    assert made == {"max_tokens": 7, "temperature": 0.5, "stop": ["a"], "seed": 3}


def test_a_server_with_a_token_lets_the_runs_own_agents_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    access = Access.of(RouterConfig(router_token_env="MY_TOKEN"))

    async def work() -> None:
        async with agents([f"one{END}"], ASYNC, tmp_path, access=access) as world:
            world.args.router_token_env = "MY_TOKEN"
            (sample,) = await session.generate(call_of(world))
            assert sample.metadata["said"] == "one"
            client = AsyncOpenAI(base_url=f"{world.url}/sessions/x/v1", api_key="anything")
            with pytest.raises(AuthenticationError):
                await client.models.list()

    asyncio.run(work())
