"""Whoever is killed in the middle of an update, no engine answers with a mixture, and the next
update heals: the trainer or another engine dies, 5 times on each way."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dovetail.engines.http import EngineRefusedError
from dovetail.engines.launch import ClientSettings
from dovetail.engines.sglang.client import SglangEngine, make_client
from dovetail.types.errors import EngineError
from dovetail.types.weights import Meeting, Snapshot
from tests.loop.tiny import make_model
from tests.takers import Forks, Takers
from tests.unit.run.test_steered import Served, served

WAYS = ("shared_memory", "disk", "delta", "broadcast", "cuda_ipc")
KILLS = 4
"""On each of five ways."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("models")
    wild = {"initializer_range": 0.3}
    return [make_model(place / str(seed), seed=seed, **wild) for seed in range(3)]


@pytest.fixture(scope="module")
def givers(tmp_path_factory: pytest.TempPathFactory, models: list[Path]) -> Iterator[Forks]:
    made = Forks(tmp_path_factory.mktemp("givers"), "tests.givers", *map(str, models))
    yield made
    made.close()


@pytest.fixture(scope="module")
def takers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Takers]:
    made = Takers(tmp_path_factory.mktemp("takers"))
    yield made
    made.close()


def wanted(way: str, disk: Path) -> dict[str, Any]:
    asked: dict[str, Any] = {"transport": way, "bucket_bytes": 16 << 10, "disk_dir": str(disk)}
    return {**asked, "transport": "disk", "delta": True} if way == "delta" else asked


async def line_of(out: Path, number: int) -> Snapshot:
    """The `number`-th thing that a giver tells."""
    while not out.exists() or len(out.read_text().splitlines()) <= number:
        await asyncio.sleep(0.005)
    facts = json.loads(out.read_text().splitlines()[number])
    facts.pop("what")
    meeting = facts.pop("meeting")
    directory = facts.pop("directory")
    return Snapshot(
        **facts,
        directory=None if directory is None else Path(directory),
        meeting=None if meeting is None else Meeting(**meeting),
    )


async def answer(engine: Served) -> list[int] | None:
    """None: it refuses."""
    try:
        return await engine.ids()
    except EngineRefusedError as error:
        assert "of no use" in str(error)
        return None


async def update(client: SglangEngine, givers: Forks, asked: dict[str, Any]) -> int:
    """One that succeeds; the giver that lives on."""
    pid, out = givers.fork(**asked)
    await client.load_snapshot(await line_of(out, 0))
    return pid


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_that_is_killed_leaves_no_mixture_and_the_next_heals(
    way: str, givers: Forks, models: list[Path], tmp_path: Path
) -> None:
    rng = random.Random(way)
    num_tensors = len(load_file(models[0] / "model.safetensors"))

    async def work() -> None:
        async with served(models[0]) as engine:
            client = make_client(engine.client.url, ClientSettings(max_context_len=256))
            known: dict[int, list[int] | None] = {0: await answer(engine)}
            for version in range(KILLS):
                asked = {"wanted": wanted(way, tmp_path / "disk"), "engines": 1}
                at = rng.randrange(num_tensors)
                dying, out = givers.fork(**asked, version=version + 1, dies_at=at)
                if way in ("broadcast", "cuda_ipc"):
                    announced = await line_of(out, 0)
                    with pytest.raises(EngineError):
                        await client.load_snapshot(announced)
                    await client.resume()
                await asyncio.to_thread(givers.wait, dying)
                found = await answer(engine)
                assert found in (known[version % 3], None)
                assert engine.engine.weight_version == version
                living = await update(client, givers, {**asked, "version": version + 1})
                found = await answer(engine)
                assert found is not None and engine.engine.weight_version == version + 1
                assert known.setdefault((version + 1) % 3, found) == found
                await asyncio.to_thread(givers.kill, living)
            # Other weights, other answers: else nothing was shown.
            assert len({tuple(one or ()) for one in known.values()}) == 3
            await client.close()

    asyncio.run(work())


@pytest.mark.parametrize("way", ["broadcast", "cuda_ipc"])
def test_another_engine_that_is_killed_leaves_no_mixture_and_the_next_heals(
    way: str, givers: Forks, takers: Takers, models: list[Path], tmp_path: Path
) -> None:
    rng = random.Random(way)
    num_tensors = len(load_file(models[0] / "model.safetensors"))

    async def work() -> None:
        async with served(models[0]) as engine:
            client = make_client(engine.client.url, ClientSettings(max_context_len=256))
            before = await answer(engine)
            for version in range(1, KILLS + 1):
                asked = {"wanted": wanted(way, tmp_path / "disk"), "version": version}
                giver, out = givers.fork(**asked, engines=2)
                announced = await line_of(out, 0)
                assert announced.meeting is not None
                at = rng.randrange(num_tensors)
                dying, _ = takers.begin(announced.meeting, dies_at=at)
                ending = asyncio.ensure_future(_told(takers, dying, announced.meeting))
                try:
                    await client.load_snapshot(announced)
                    whole = True  # It had everything before the other died.
                except EngineError:
                    whole = False
                    await client.resume()
                await ending
                found = await answer(engine)
                if not whole:
                    assert found in (before, None)
                with_it = await update(client, givers, {**asked, "engines": 1})
                found = await answer(engine)
                assert found is not None and engine.engine.weight_version == version
                before = found
                for pid in (giver, with_it):
                    if pid in givers.pids:
                        await asyncio.to_thread(_gone, givers, pid)
            await client.close()

    asyncio.run(work())


async def _told(takers: Takers, pid: int, meeting: Meeting) -> None:
    from dovetail.transport.meeting import break_off

    await asyncio.to_thread(takers.wait, pid)
    await asyncio.to_thread(break_off, meeting, "an engine died")


def _gone(givers: Forks, pid: int) -> None:
    try:
        givers.kill(pid)
    except ProcessLookupError:
        givers.wait(pid)
