"""How sessions end, and how many there are and how much they record at most."""

from __future__ import annotations

import asyncio

import pytest

from dovetail.router.fields import RequestError
from dovetail.router.sessions.server import SERVED
from dovetail.router.sessions.store import SessionLimits, SessionStore
from tests.unit.router.talking import END, HELLO, World, in_world, samples_of, talking


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

    in_world([f"a{END}"], work)


def test_an_aborted_engine_ends_the_session() -> None:
    async def work(world: World, session_id: str) -> None:
        await world.talker.abort()
        body = {"messages": HELLO}
        path = f"/sessions/{session_id}/v1/chat/completions"
        assert (await world.ask("POST", path, body)).status == 410
        assert (await world.ask("POST", path, body)).status == 410
        assert len(world.talker.requests) == 1
        assert world.sessions.store.find(session_id).aborted
        assert await samples_of(world, session_id) == []

    in_world([f"a{END}"], work)


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
