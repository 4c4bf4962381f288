"""Agents are tried out before a run, in a session whose engine has written answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.cli.main import main

pytestmark = pytest.mark.timeout(180)

AGENTS = """
import asyncio
import json
import re
import time

from openai import AsyncOpenAI, OpenAI


def asked(prompt):
    return [{"role": "user", "content": prompt}]


async def answered(base_url, messages, **more):
    client = AsyncOpenAI(base_url=base_url, api_key="any", timeout=None)
    completion = await client.chat.completions.create(model="policy", messages=messages, **more)
    return completion.choices[0]


async def of_text(base_url, prompt, request_kwargs, metadata):
    assert metadata["rehearsal"] and isinstance(prompt, str)
    choice = await answered(base_url, asked(prompt), **request_kwargs)
    return {"answer": choice.message.content}


async def of_chats(base_url, prompt, metadata):
    await answered(base_url, [prompt[-1]])


def plain(base_url, prompt):
    client = OpenAI(base_url=base_url, api_key="any", timeout=None)
    client.chat.completions.create(model="policy", messages=asked(prompt))


async def wants_json(base_url, prompt):
    choice = await answered(base_url, asked(prompt))
    return json.loads(choice.message.content)


async def wants_a_number(base_url, prompt):
    choice = await answered(base_url, asked(prompt))
    return {"number": re.search("<number>(.*)</number>", choice.message.content).group(1)}


async def takes_its_time(base_url, prompt):
    await answered(base_url, asked(prompt))
    await asyncio.sleep(60)


def starts_a_container(base_url, prompt):
    time.sleep(60)


async def finds_no_service(base_url, prompt):
    raise ConnectionRefusedError("the sandbox is down")


async def misspells_before(base_url, prompt):
    return {"asked": promt}


async def misspells_behind(base_url, prompt):
    choice = await answered(base_url, asked(prompt))
    return {"answer": choice.mesage.content}


async def gives_text(base_url, prompt):
    return (await answered(base_url, asked(prompt))).message.content


async def asks_wrongly(base_url, prompt):
    await answered(base_url, prompt and "no messages")


async def asks_elsewhere_in_it(base_url, prompt):
    await answered(f"{base_url}/v2", asked(prompt))


async def stands_still(base_url, prompt):
    plain(base_url, prompt)


async def asks_nothing(base_url, prompt):
    return {}
"""


def line_of(words: str) -> int:
    return AGENTS.splitlines().index(words) + 1


def checked(name: str, folder: Path, *flags: str) -> int:
    file = folder / "mine.py"
    file.write_text(AGENTS, encoding="utf-8")
    return main(["hooks", "check", "--custom-agent-function-path", f"{file}:{name}", *flags])


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("of_text", None),
        ("of_chats", None),
        ("plain", None),
        ("wants_json", "JSONDecodeError"),
        ("wants_a_number", "'NoneType' object has no attribute 'group'"),
        ("takes_its_time", "still at work"),
    ],
)
def test_an_agent_that_asks_its_session_is_right_and_what_its_answer_causes_is_noted(
    name: str, note: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(name, tmp_path) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok ") and ("note:" in out) == (note is not None)
    assert (note or "") in out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("starts_a_container", "asked for nothing within"),
        ("finds_no_service", "the sandbox is down"),
        ("asks_nothing", "without a request"),
    ],
)
def test_what_cannot_be_judged_is_no_fault(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(name, tmp_path) == 0
    out = capsys.readouterr().out
    assert out.startswith("? ") and says in out


@pytest.mark.parametrize(
    ("name", "says", "line"),
    [
        ("misspells_before", "name 'promt' is not defined", '    return {"asked": promt}'),
        ("misspells_behind", "'mesage'", '    return {"answer": choice.mesage.content}'),
        ("gives_text", "gave back str", None),
        ("asks_wrongly", "expected a list of messages", None),
        ("asks_elsewhere_in_it", "no such path", None),
        (
            "stands_still",
            "write `def` instead of `async def`",
            '    client.chat.completions.create(model="policy", messages=asked(prompt))',
        ),
    ],
)
def test_a_fault_is_told_by_its_line(
    name: str, says: str, line: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(name, tmp_path) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL ") and says in out
    assert line is None or f"mine.py:{line_of(line)}" in out


def test_a_run_is_refused_over_its_agent_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(AGENTS, encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "1+1=", "label": "2"}\n' * 4, encoding="utf-8")
    model = tmp_path / "model"
    model.mkdir()
    flags = ["--hf-checkpoint", str(model), "--prompt-data", str(rows), "--label-key", "label"]
    flags += ["--num-rollout", "1", "--n-samples-per-prompt", "4", "--rm-type", "math"]
    flags += ["--run-dir", str(tmp_path / "run")]
    flags += ["--progress", "off", "--device", "cpu", "--custom-generate-function-path", "agent"]
    flags += ["--custom-agent-function-path", f"{tmp_path}/mine.py:asks_nothing"]
    assert main(["train", *flags]) == 2
    err = capsys.readouterr().err
    # The data is the run's own, so that it is a fault.
    assert "--custom-agent-function-path" in err and "without a request" in err
    assert "--custom-generate-function-path" not in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()
