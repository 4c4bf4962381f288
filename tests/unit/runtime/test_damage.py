"""Damaged weights are not an engine's fault: it is not started again and again because of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dovetail.types.errors import EngineError
from dovetail.weights.publish import publish
from tests.unit.runtime.places import Place, first_lines, request, run, until, weights


def damage(directory: Path) -> None:
    file = next(directory.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 4)


def test_damaged_weights_end_a_run_at_once_by_their_name(place: Place) -> None:
    async def work() -> None:
        fleet = place.fleet(place.quick())
        await fleet.start(place.path)
        await publish([fleet.engine], 1, weights(1))
        store = fleet._store
        assert store is not None
        write = store.write

        def write_badly(version, tensors):
            snapshot = write(version, tensors)
            damage(snapshot.directory)
            return snapshot

        store.write = write_badly
        with pytest.raises(EngineError, match=r"weights of version 2 .*are damaged: .*were writt"):
            await publish([fleet.engine], 2, weights(2))
        with pytest.raises(EngineError, match="update-weight-disk-dir"):
            await fleet.engine.generate(request(1))

    run(work())
    assert first_lines(place.path / "engine_0.log") == 1


def test_an_engine_that_died_waits_for_the_next_weights_where_these_are_damaged(
    place: Place,
) -> None:
    async def work() -> None:
        fleet = place.fleet(place.quick(0), place.quick(1))
        await fleet.start(place.path)
        await publish([fleet.engine], 1, weights(1))
        snapshot, first = fleet.pool.snapshot, fleet.far.members[0]
        assert snapshot is not None and first.process is not None
        damage(snapshot.directory)
        first.process.kill()
        await until(lambda: [one.ready for one in fleet.facts()] == [False, True])
        assert (await fleet.engine.generate(request(1))).token_ids
        assert first.restarts == 0
        await publish([fleet.engine], 2, weights(2))
        await until(lambda: [one.ready for one in fleet.facts()] == [True, True])
        assert [one.weight_version for one in fleet.facts()] == [2, 2]

    run(work())
