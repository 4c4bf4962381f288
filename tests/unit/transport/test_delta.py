"""Deltas: what changed and no more, without loss, each on top of the one before."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.transport import delta as module
from dovetail.transport.chain import arriving
from dovetail.transport.delta import DeltaStore, applied, encoded
from dovetail.transport.place import Wanted
from dovetail.transport.receive import SnapshotReader, check_whole
from dovetail.types import EngineError

NAN = float("nan")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DeltaStore]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    made = DeltaStore(Wanted("disk", tmp_path / "disk", delta=True, digests=True), model)
    yield made
    made.close()


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "half": torch.randn(64, 300).to(torch.bfloat16),
        "turned": torch.randn(20, 30).T,
        "whole": torch.randn(50, 50),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 4),
    }


def stepped(before: dict[str, torch.Tensor], version: int) -> dict[str, torch.Tensor]:
    """A few numbers of one tensor, all of another, and those that compare oddly."""
    torch.manual_seed(version)
    after = {name: tensor.clone() for name, tensor in before.items()}
    flat = after["half"].view(-1)
    flat[torch.randint(len(flat), (40,))] += 1
    flat[0], flat[1], flat[2] = NAN, 0.0, -0.0
    after["whole"] += 0.5
    return after


class Holder:
    """An engine's side: what it holds, and the state of that."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}
        self.state: str | None = None
        self.reader = SnapshotReader()

    def take(self, directory: Path) -> bool:
        """Whether everything was read."""
        with arriving(self.reader, directory, self.state, self.held.get) as coming:
            found = {name: tensor.clone() for name, tensor in coming.tensors}
            self.held, self.state = {**self.held, **found}, coming.state
            return coming.whole


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return one.keys() == other.keys() and all(raw(one[n]) == raw(other[n]) for n in one)


def test_who_follows_every_version_reads_only_what_changed_and_holds_the_same_bytes(
    store: DeltaStore,
) -> None:
    follower, now, sizes = Holder(), weights(), []
    for version in range(1, 6):
        snapshot = store.send(version, now.items())
        sizes.append(snapshot.num_bytes)
        assert snapshot.directory is not None and check_whole(snapshot.directory) == version
        assert follower.take(snapshot.directory) == (version == 1)
        assert same(follower.held, now)
        assert snapshot.digests is not None and snapshot.digests.keys() == now.keys()
        store.retire(version)
        now = stepped(now, version)
    assert all(size < sizes[0] / 3 for size in sizes[1:])


def test_who_missed_some_or_starts_anew_gets_there_too(store: DeltaStore) -> None:
    late, now = Holder(), weights()
    for version in range(1, 6):
        snapshot = store.send(version, now.items())
        assert snapshot.directory is not None
        if version == 2:
            late.take(snapshot.directory)
        store.retire(version)
        last, now = now, stepped(now, version)
    assert not late.take(snapshot.directory)
    new, foreign = Holder(), Holder()
    foreign.state = "of another run"
    assert new.take(snapshot.directory) and foreign.take(snapshot.directory)
    assert same(late.held, last) and same(new.held, last) and same(foreign.held, last)


def test_now_and_then_everything_is_written_and_older_files_go(
    store: DeltaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FULL_EVERY", 3)
    holder, now, whole = Holder(), weights(), []
    for version in range(1, 12):
        snapshot = store.send(version, now.items())
        assert snapshot.directory is not None
        with arriving(SnapshotReader(), snapshot.directory, None, lambda name: None) as coming:
            assert coming.whole
        before = holder.state
        holder.take(snapshot.directory)
        assert holder.state != before and same(holder.held, now)
        whole.append(len(list(store.directory.glob("0*"))))
        store.retire(version)
        now = stepped(now, version)
    assert max(whole) <= 5


def test_nothing_changed_is_nothing_written(store: DeltaStore) -> None:
    now = weights()
    store.send(1, now.items())
    assert store.send(2, now.items()).num_bytes == 0


def test_a_write_that_breaks_off_is_followed_by_everything(store: DeltaStore) -> None:
    def broken() -> Any:
        yield "half", weights()["half"] + 1
        raise OSError(28, "No space left on device")

    now = weights()
    first = store.send(1, now.items())
    with pytest.raises(EngineError, match="No space left"):
        store.send(2, broken())
    after = stepped(now, 2)
    second = store.send(2, after.items())
    assert second.num_bytes == first.num_bytes
    holder = Holder()
    assert second.directory is not None
    holder.take(second.directory)
    assert same(holder.held, after)


def test_damage_anywhere_in_the_chain_is_found(store: DeltaStore) -> None:
    now = weights()
    first = store.send(1, now.items())
    second = store.send(2, stepped(now, 1).items())
    assert first.directory is not None and second.directory is not None
    shutil.rmtree(first.directory)
    with pytest.raises(EngineError):
        check_whole(second.directory)
    with pytest.raises(EngineError):
        Holder().take(second.directory)


def test_another_base_than_the_state_says_is_found_before_anything_is_taken(
    store: DeltaStore,
) -> None:
    holder, now = Holder(), weights()
    first = store.send(1, now.items())
    assert first.directory is not None
    holder.take(first.directory)
    holder.held["half"][5, 5] += 1
    second = store.send(2, stepped(now, 1).items())
    assert second.directory is not None
    with pytest.raises(EngineError, match="half with its deltas is not what was written"):
        holder.take(second.directory)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_two_arrays_are_told_apart_without_loss(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 3000))
    old = numpy.zeros(size, numpy.uint16)
    places = data.draw(st.lists(st.integers(0, size - 1), max_size=12, unique=True))
    new = old.copy()
    for place in places:
        new[place] = data.draw(st.integers(0, 65535))
    delta = encoded(old, new)
    if delta is None:
        assert (old == new).all()
    elif delta is not True:
        base = torch.from_numpy(old.view(numpy.int16)).view(torch.bfloat16)
        gaps, values = delta.gaps, torch.from_numpy(delta.values.view(numpy.uint8))
        made = applied(base, torch.from_numpy(gaps), values)
        assert (made.view(torch.int16).numpy().view(numpy.uint16) == new).all()
