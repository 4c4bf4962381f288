"""The order of an update: files first and then the engines, hand to hand both at once; tries; and
whether engines hold what was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dovetail.types.errors import BrokenUpdateError, EngineError, TrainError, WeightMismatchError
from dovetail.types.weights import Meeting, Snapshot
from dovetail.weights.check import Holder, differences
from dovetail.weights.publish import MOST_TRIES, deliver


class Sender:
    """Tells what is asked of it."""

    def __init__(self, told: list[str], *, meets: bool, digests: Mapping[str, str] | None) -> None:
        self.told, self.meets, self.digests = told, meets, digests
        self.failures: list[Exception] = []

    def announce(self, version: int, num_engines: int) -> Snapshot:
        self.told.append(f"announce {version} to {num_engines}")
        nobody = Meeting("broadcast", "127.0.0.1", 1, "m", num_engines, "gloo", 0.1)
        return Snapshot(version, None, 0, nobody)

    def send(self, version: int, tensors: Iterable[Any]) -> Snapshot:
        self.told.append(f"send {version}: {len(list(tensors))} tensors")
        if self.failures:
            raise self.failures.pop(0)
        return Snapshot(version, Path("/x"), 8, digests=self.digests)

    def retire(self, before: int) -> None:
        self.told.append(f"retire {before}")

    def close(self) -> None: ...


class Engine:
    def __init__(self, held: Mapping[str, str]) -> None:
        self.url, self.held = "http://127.0.0.1:1", held

    async def weight_digests(self) -> Mapping[str, str]:
        return self.held


class Engines:
    def __init__(self, told: list[str], held: Mapping[str, str] | None = None) -> None:
        self.told, self.held = told, held or {}
        self.num_receivers = 2
        self.failures: list[Exception] = []

    async def load(self, snapshot: Snapshot) -> None:
        self.told.append(f"load {snapshot.version}")
        await asyncio.sleep(0.01)
        if self.failures:
            raise self.failures.pop(0)

    def holders(self) -> Sequence[Holder]:
        return [Engine(self.held)]


class Tensors:
    """Can be iterated over again."""

    def __iter__(self) -> Any:
        return iter([("a", None), ("b", None)])


def made(*, meets: bool, sent: Any = None, held: Any = None) -> tuple[list[str], Sender, Engines]:
    told: list[str] = []
    return told, Sender(told, meets=meets, digests=sent), Engines(told, held)


def run(sender: Sender, engines: Engines) -> Snapshot:
    return asyncio.run(deliver(sender, engines, 7, Tensors()))


def test_files_are_written_then_loaded_and_the_version_before_goes() -> None:
    told, sender, engines = made(meets=False)
    run(sender, engines)
    assert told == ["send 7: 2 tensors", "load 7", "retire 7"]


def test_hand_to_hand_engines_load_while_the_trainer_sends() -> None:
    told, sender, engines = made(meets=True)
    run(sender, engines)
    assert told[0] == "announce 7 to 2" and told[-1] == "retire 7"
    assert sorted(told[1:3]) == ["load 7", "send 7: 2 tensors"]


def test_a_try_that_broke_off_is_made_again_for_those_that_are_left() -> None:
    told, sender, engines = made(meets=True)
    sender.failures = [BrokenUpdateError("an engine died")]
    engines.failures = [BrokenUpdateError("an engine died")]
    run(sender, engines)
    assert told.count("announce 7 to 2") == 2 and told.count("send 7: 2 tensors") == 2


def test_tries_have_an_end() -> None:
    told, sender, engines = made(meets=True)
    sender.failures = [BrokenUpdateError("again")] * 9
    with pytest.raises(BrokenUpdateError, match="again"):
        run(sender, engines)
    assert told.count("load 7") == MOST_TRIES


def test_the_trainers_own_trouble_is_its_own() -> None:
    _, sender, engines = made(meets=True)
    sender.failures = [TrainError("out of memory")]
    engines.failures = [BrokenUpdateError("the trainer broke off")]
    with pytest.raises(TrainError, match="out of memory"):
        run(sender, engines)


def test_without_an_engine_nothing_is_sent() -> None:
    told, sender, engines = made(meets=True)
    engines.num_receivers = 0
    with pytest.raises(EngineError, match="no engine is there"):
        run(sender, engines)
    assert told == []


def test_a_difference_between_sent_and_held_is_told_by_tensor_and_engine() -> None:
    _, sender, engines = made(meets=False, sent={"a": "1", "b": "2"}, held={"a": "1", "b": "2"})
    run(sender, engines)
    _, sender, engines = made(meets=False, sent={"a": "1", "b": "2"}, held={"a": "1", "b": "3"})
    with pytest.raises(WeightMismatchError, match=r"127.0.0.1:1 .* version 7 .*1 tensors.* b "):
        run(sender, engines)


def test_a_tensor_on_one_side_only_is_a_difference() -> None:
    assert differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == ["a", "c"]
