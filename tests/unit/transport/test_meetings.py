"""Weights hand to hand: broadcasts of a process group, and memory that both sides map."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.transport import handles
from dovetail.transport.meeting import break_off, joined
from dovetail.transport.place import Wanted
from dovetail.transport.sender import MeetingSender
from dovetail.transport.tensor_files import tensor_digest
from dovetail.types.errors import BrokenUpdateError, EngineError
from dovetail.types.weights import Meeting, Snapshot
from tests.takers import Takers

WAYS = ("broadcast", "cuda_ipc")
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def takers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Takers]:
    made = Takers(tmp_path_factory.mktemp("takers"))
    yield made
    made.close()


@pytest.fixture(params=WAYS)
def sender(request: pytest.FixtureRequest) -> Iterator[MeetingSender]:
    wanted = Wanted(request.param, bucket_bytes=16 << 10, digests=True)
    made = MeetingSender(wanted, PATIENCE_S)
    yield made
    made.close()


def weights(version: int) -> dict[str, torch.Tensor]:
    """Of several dtypes and shapes, more than four buckets of them."""
    torch.manual_seed(version)
    rows = torch.randn(40, 50)
    return {
        "flag": torch.tensor(True),
        "half": rows.to(torch.bfloat16),
        "turned": rows.T,
        **{f"layer.{i}": torch.randn(30, 40) for i in range(8)},
        "large": torch.randn(10_000),
        "scalar": torch.tensor(version),
        "none": torch.empty(0, 4),
    }


def sent(sender: MeetingSender, version: int) -> Snapshot | BaseException:
    try:
        return sender.send(version, weights(version).items())
    except BaseException as error:
        return error


def found(out: Path) -> Any:
    return json.loads(out.read_text())


def digests(version: int) -> dict[str, str]:
    return {name: tensor_digest(tensor) for name, tensor in weights(version).items()}


def meeting_of(snapshot: Snapshot) -> Meeting:
    assert snapshot.meeting is not None
    return snapshot.meeting


def test_every_engine_holds_what_was_sent_version_after_version(
    sender: MeetingSender, takers: Takers
) -> None:
    for version, engines in ((1, 1), (2, 3), (3, 2)):
        announced = sender.announce(version, engines)
        assert not announced.lasting
        begun = [takers.begin(meeting_of(announced)) for _ in range(engines)]
        snapshot = sender.send(version, weights(version).items())
        assert snapshot.digests == digests(version)
        assert snapshot.num_bytes == sum(one.nbytes for one in weights(version).values())
        for pid, out in begun:
            assert takers.wait(pid) == 0
            assert found(out) == {"tensors": digests(version), "broken": None}


@pytest.mark.parametrize("at", [0, 5, 13])
def test_an_engine_that_dies_in_the_middle_ends_the_try_and_hangs_nobody(
    sender: MeetingSender, takers: Takers, at: int
) -> None:
    announced = sender.announce(1, 3)
    dying, _ = takers.begin(meeting_of(announced), dies_at=at)
    others = [takers.begin(meeting_of(announced)) for _ in range(2)]
    began = time.monotonic()
    ender = threading.Thread(target=_end_when_dead, args=(takers, dying, announced))
    ender.start()
    outcome = sent(sender, 1)
    for pid, _ in others:
        assert takers.wait(pid) == 0
    ender.join()
    assert time.monotonic() - began < PATIENCE_S
    assert isinstance(outcome, BrokenUpdateError)
    # The next try, without it, heals the others.
    announced = sender.announce(1, 2)
    begun = [takers.begin(meeting_of(announced)) for _ in range(2)]
    assert isinstance(sent(sender, 1), Snapshot)
    for pid, out in begun:
        assert takers.wait(pid) == 0
        assert found(out)["tensors"] == digests(1)


def _end_when_dead(takers: Takers, pid: int, announced: Snapshot) -> None:
    """What `weights.publish` does when the pool learns of a death."""
    assert takers.wait(pid) == -signal.SIGKILL
    break_off(meeting_of(announced), "an engine died")


def test_an_engine_that_stands_still_is_waited_for_only_so_long(takers: Takers) -> None:
    for way in WAYS:
        sender = MeetingSender(Wanted(way, bucket_bytes=8 << 10), patience_s=1.5)
        announced = sender.announce(1, 2)
        still, _ = takers.begin(meeting_of(announced), stops_at=3)
        other, out = takers.begin(meeting_of(announced))
        began = time.monotonic()
        assert isinstance(sent(sender, 1), BrokenUpdateError)
        assert takers.wait(other) == 0
        assert time.monotonic() - began < 15
        assert found(out)["broken"]
        os.kill(still, signal.SIGKILL)
        takers.wait(still)
        sender.close()


def test_a_trainer_that_fails_in_the_middle_is_told_to_every_engine(
    sender: MeetingSender, takers: Takers
) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        for number, pair in enumerate(weights(1).items()):
            if number == 9:
                raise ZeroDivisionError("the trainer's own trouble")
            yield pair

    announced = sender.announce(1, 2)
    begun = [takers.begin(meeting_of(announced)) for _ in range(2)]
    with pytest.raises(ZeroDivisionError):
        sender.send(1, broken())
    for pid, out in begun:
        assert takers.wait(pid) == 0
        assert found(out)["broken"]


def test_nobody_takes_part_who_was_not_announced(sender: MeetingSender, takers: Takers) -> None:
    announced = sender.announce(1, 1)
    first, _ = takers.begin(meeting_of(announced))
    assert isinstance(sent(sender, 1), Snapshot)
    assert takers.wait(first) == 0
    with pytest.raises(EngineError, match="unannounced"):
        sender.send(1, weights(1).items())


def test_one_engine_too_many_is_refused(sender: MeetingSender) -> None:
    announced = sender.announce(1, 1)
    joined(meeting_of(announced))
    with pytest.raises(BrokenUpdateError, match="all there"):
        joined(meeting_of(announced))


def test_a_trainer_that_is_gone_is_no_place_to_meet(sender: MeetingSender) -> None:
    announced = sender.announce(1, 1)
    sender.close()
    gone = Meeting(**{**_fields(meeting_of(announced)), "port": 1, "patience_s": 1.0})
    with pytest.raises(BrokenUpdateError, match="can't be reached"):
        joined(gone)
    break_off(gone, "nobody hears it")


def _fields(meeting: Meeting) -> dict[str, Any]:
    return {name: getattr(meeting, name) for name in Meeting.__slots__}


@pytest.mark.parametrize(
    "wrong",
    [
        {"handle": "/etc/passwd"},
        {"handle": "/torch_1_2_3/../x"},
        {"manager": "/tmp/other.sock"},
        {"kind": "pickle"},
        {"kind": "cuda", "handle": "AAAA", "ref_counter_handle": "", "event_handle": ""},
        {"bytes": "many"},
    ],
)
def test_a_handle_that_is_no_plain_description_of_shared_memory_is_not_opened(
    wrong: dict[str, str],
) -> None:
    facts = handles._described(handles._shared(64, torch.device("cpu")))
    with pytest.raises((ValueError, KeyError)):
        handles._opened({**facts, **wrong}, torch.device("cpu"))


def test_no_second_copy_of_the_weights_is_in_memory(takers: Takers) -> None:
    """Peak of what the sender holds: two buckets and one tensor, of 64 tensors."""
    for way in WAYS:
        rooms: list[int] = []
        sender = MeetingSender(Wanted(way, bucket_bytes=1 << 20), PATIENCE_S)
        announced = sender.announce(1, 1)
        pid, _ = takers.begin(meeting_of(announced))
        living: set[int] = set()

        def made(living: set[int] = living, rooms: list[int] = rooms) -> Any:
            for number in range(64):
                living.add(number)
                tensor = torch.full((32, 1024), float(number))
                rooms.append(len(living))
                yield f"layer.{number}", tensor
                # Nobody may look at it any more: what is here now is noise.
                tensor.fill_(float("nan"))
                living.discard(number)

        snapshot = sender.send(1, made())
        assert takers.wait(pid) == 0
        assert max(rooms) == 1 and snapshot.num_bytes == 64 * 128 << 10
        sender.close()


def test_a_store_listens_at_the_address_that_it_is_given_and_at_no_other():
    from datetime import timedelta

    from torch.distributed import TCPStore

    from dovetail.transport.meeting import listening_at

    limit = timedelta(seconds=20)
    store = listening_at("127.0.0.1", limit, world=2)
    rows = [
        line.split()[1:4]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    listens = [at for at, _, state in rows if state == "0A" and at.endswith(f":{store.port:04X}")]
    assert listens == [f"0100007F:{store.port:04X}"]
    other = TCPStore("127.0.0.1", store.port, 2, is_master=False, timeout=limit)
    other.set("key", "value")
    assert store.get("key") == b"value"
