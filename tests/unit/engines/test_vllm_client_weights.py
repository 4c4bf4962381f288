"""Weights and memory of vLLM's server, by its client."""

from pathlib import Path

import pytest

from dovetail.engines.vllm.weights import NcclGroup, TensorNames
from dovetail.types.errors import EngineError, EngineGoneError
from dovetail.types.weights import Snapshot
from tests.unit.engines.vllm_protocol import answer, error, generate, run

SNAPSHOT = Snapshot(7, Path("/dev/shm/weights/000007"), 1234)


def test_versions_are_numbers_or_none_yet():
    async def work(client, server):
        found = []
        for said in ("default", "0", "12"):
            server.answers["/weight_info"] = {"weight_version": said}
            found.append(await client.weight_version())
        server.answers["/weight_info"] = {"weight_version": "damaged by 3"}
        with pytest.raises(EngineGoneError, match="'damaged by 3'"):
            await client.weight_version()
        return found

    assert run(work) == [None, 0, 12]
    with pytest.raises(EngineGoneError, match="'damaged by 3'"):
        generate(answer([8], version="damaged by 3"))


def test_a_snapshot_is_loaded_between_a_pause_and_a_resume():
    async def work(client, server):
        server.answers["/reset_prefix_cache"] = {"success": True}
        await client.load_snapshot(SNAPSHOT)
        alone = list(server.asked)
        server.asked.clear()
        await client.pause()
        await client.load_snapshot(SNAPSHOT)
        return alone, server.paths()

    alone, paused = run(work)
    update = {"directory": "/dev/shm/weights/000007", "num_bytes": 1234}
    assert alone == [
        ("/pause?mode=keep", None),
        ("/start_weight_update", None),
        ("/update_weights", {"update_info": update}),
        ("/finish_weight_update", {"weight_version": "7"}),
        ("/reset_prefix_cache?reset_running_requests=true", None),
        ("/resume", None),
    ]
    assert paused.count("/pause?mode=keep") == 1 and "/resume" not in paused


def test_a_refused_snapshot_is_an_error_and_the_version_stays():
    async def work(client, server):
        server.answers["/update_weights"] = error("snapshot refused: model.norm.weight is missing")
        with pytest.raises(EngineError, match=r"version 7 did not reach .*model\.norm\.weight"):
            await client.load_snapshot(SNAPSHOT)
        return server.paths()

    paths = run(work)
    assert paths[-1] == "/resume"
    assert not {"/finish_weight_update", "/update_weight_version"} & set(paths)


@pytest.mark.parametrize("where", ["/update_weights", "/finish_weight_update"])
def test_an_update_that_breaks_off_leaves_a_version_that_is_none(where):
    async def work(client, server):
        server.answers[where] = error("out of memory")
        with pytest.raises(EngineError, match="out of memory"):
            await client.load_snapshot(SNAPSHOT)
        return server.asked

    assert ("/update_weight_version", {"new_version": "damaged by 7"}) in run(work)


def test_keys_and_values_that_stay_are_an_error():
    async def work(client, server):
        server.answers["/reset_prefix_cache"] = {"success": False}
        with pytest.raises(EngineError, match="older weights"):
            await client.load_snapshot(SNAPSHOT)

    run(work)


def test_an_update_that_somebody_left_open_is_ended_first():
    async def work(client, server):
        server.answers["/reset_prefix_cache"] = {"success": True}

        async def start(body):
            if server.paths().count("/start_weight_update") == 1:
                return error("start_weight_update called while an update is already active")
            return {}

        server.answers["/start_weight_update"] = start
        await client.load_snapshot(SNAPSHOT)
        return server.paths()[1:5]

    assert run(work) == [
        "/start_weight_update",
        "/finish_weight_update",
        "/start_weight_update",
        "/update_weights",
    ]


def test_the_ways_between_gpus_are_asked_for_as_vllm_words_them():
    async def work(client, server):
        server.answers["/get_world_size"] = {"world_size": 4}
        transfer = client.transfer
        group = NcclGroup("10.0.0.1", 29500, world_size=5, rank_offset=1)
        assert await transfer.world_size() == 4
        await transfer.init(group)
        await transfer.start()
        await transfer.update(TensorNames(["w"], ["bfloat16"], [[2, 3]]))
        await transfer.finish("8")
        await transfer.init({"packed": True})
        return server.asked

    assert run(work) == [
        ("/get_world_size", None),
        (
            "/init_weight_transfer_engine",
            {
                "init_info": {
                    "master_address": "10.0.0.1",
                    "master_port": 29500,
                    "world_size": 5,
                    "rank_offset": 1,
                    "packed": True,
                }
            },
        ),
        ("/start_weight_update", None),
        (
            "/update_weights",
            {"update_info": {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}},
        ),
        ("/finish_weight_update", {"weight_version": "8"}),
        ("/init_weight_transfer_engine", {"init_info": {"packed": True}}),
    ]


def test_sleep_gives_everything_back_and_waking_keeps_a_pause():
    async def work(client, server):
        await client.sleep()
        await client.wake()
        await client.pause()
        await client.wake()
        return server.paths()

    assert run(work) == [
        "/sleep?level=2&mode=abort",
        "/wake_up",
        "/pause?mode=keep",
        "/wake_up",
        "/pause?mode=keep",
    ]
