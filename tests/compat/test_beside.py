"""What plugins use beside the rollout: HTTP, the background loop, loading, metrics, timers."""

from __future__ import annotations

import asyncio
import math
import warnings
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from dovetail.compat.modules import async_loop, http, metrics, misc, timer
from dovetail.types import HookError
from tests.compat.engine_server import serving


def test_post_tries_again_and_parses_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_RETRY_S", 0.01)

    async def play() -> None:
        async with serving() as server:
            host, port = server.address
            server.fail = 2
            answer = await http.post(f"http://{host}:{port}/generate", {"input_ids": [1]})
            assert answer["text"] == "abc" and len(server.asked) == 3
            assert await http.get(f"http://{host}:{port}/text") == "no json"
            assert "workers" in await http.post(f"http://{host}:{port}/workers", None, action="get")
            await http.wait_http_ok(f"http://{host}:{port}/text", timeout=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        asyncio.run(play())


def test_post_gives_up_after_its_tries_with_what_the_server_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "_RETRY_S", 0.01)

    async def play() -> None:
        async with serving() as server:
            host, port = server.address
            server.fail = 9
            with pytest.raises(aiohttp.ClientResponseError, match="not yet"):
                await http.post(f"http://{host}:{port}/generate", {"a": 1}, max_retries=3)
            assert len(server.asked) == 3
            with pytest.raises(TimeoutError, match="status 405"):
                await http.wait_http_ok(f"http://{host}:{port}/generate", timeout=0.01)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rollout_num_engines": 5, "rollout_num_gpus": 8}, 5),
        ({"rollout_num_gpus": 8, "rollout_num_gpus_per_engine": 4}, 2),
        ({"rollout_num_gpus": 2, "rollout_num_gpus_per_engine": 4}, 1),
        ({"rollout_num_gpus": 0}, 0),
        ({}, 0),
    ],
)
def test_engines_are_counted_from_args(values: dict[str, int], expected: int) -> None:
    assert http.get_rollout_num_engines(type("Args", (), values)) == expected


def test_run_waits_for_a_coroutine_on_the_background_loop() -> None:
    async def name() -> str:
        import threading

        return threading.current_thread().name

    assert async_loop.run(name()) == async_loop.run(name()) == "dovetail-plugin-loop"

    async def waits_for_itself() -> Any:
        return async_loop.run(name())

    with pytest.raises(RuntimeError, match="await"):
        async_loop.run(waits_for_itself())


def test_functions_are_loaded_by_every_kind_of_path(tmp_path: Path) -> None:
    file = tmp_path / "their_rewards.py"
    file.write_text("def rm(): return 3\n")
    assert misc.load_function("math.floor") is math.floor
    assert misc.load_function(f"{file}:rm")() == 3
    assert misc.load_function("slime:math.floor") is math.floor
    assert misc.load_function(None) is None and misc.load_function("") is None
    with pytest.raises(AttributeError):
        misc.load_function("math.nothing")
    with pytest.raises(ModuleNotFoundError):
        misc.load_function("no_such_module.fn")
    with pytest.raises(HookError):
        misc.load_function("nothing_at_all")


def test_a_registered_name_stands_for_its_function_while_it_is_registered() -> None:
    async def fn() -> None: ...

    with misc.function_registry.temporary("mine", fn):
        assert misc.load_function("mine") is fn
        with pytest.raises(ValueError, match="async"):
            misc.load_function("mine", sync_required=True)
    assert misc.function_registry.get("mine") is None


def test_periodic_actions_are_due_at_intervals_epoch_ends_and_the_end() -> None:
    due = [i for i in range(10) if misc.should_run_periodic_action(i, 4, 3, 10)]
    assert due == [2, 3, 5, 7, 8, 9]
    assert not misc.should_run_periodic_action(9, None, 3, 10)


def test_an_agents_abort_is_called_and_its_failure_is_only_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys
    from types import ModuleType

    called = []

    async def abort(args: Any) -> None:
        called.append(args)
        raise OSError("backend is gone")

    module = ModuleType("their_agent")
    module.__dict__["abort"] = abort
    monkeypatch.setitem(sys.modules, "their_agent", module)
    args = type("Args", (), {"custom_agent_function_path": "their_agent.run"})
    asyncio.run(misc.call_agent_abort_hook(args))
    assert called == [args] and "their_agent.abort failed" in caplog.text
    asyncio.run(misc.call_agent_abort_hook(type("Args", (), {})))


def test_pass_rates_of_whole_and_of_ragged_groups() -> None:
    # pass@1 of (1 of 2), (2 of 2): 3/4; pass@2: both groups have a right one.
    assert metrics.compute_pass_rate([1, 0, 1, 1], 2) == {"pass@1": 0.75, "pass@2": 1.0}
    ragged = metrics.compute_pass_rate([1, 0, 0], 2, group_ids=["a", "a", "b"])
    assert ragged == {"pass@1": 0.25, "pass@2": 1.0}
    with pytest.raises(ValueError, match="3 rewards"):
        metrics.compute_pass_rate([1, 0, 0], 2)


def test_texts_and_values_are_described() -> None:
    described = metrics.compute_statistics([1, 2, 9])
    assert described == {"mean": 4.0, "median": 2.0, "max": 9.0, "min": 1.0}
    assert metrics.has_repetition("so " * 5000) and not metrics.has_repetition("so " * 10)
    assert metrics.dict_add_prefix({"a": 1}, "x/") == {"x/a": 1}
    args = type(
        "Args",
        (),
        {
            "wandb_always_use_train_step": True,
            "rollout_batch_size": 4,
            "n_samples_per_prompt": 8,
            "global_batch_size": 16,
        },
    )
    assert metrics.compute_rollout_step(args, 3) == 6


def test_a_timer_adds_up_and_can_be_stopped_meanwhile() -> None:
    one = timer.Timer()
    one.reset()
    with timer.timer("work"), timer.inverse_timer("work"):
        pass
    one.add("work", 5.0)
    assert 5.0 <= one.log_dict()["work"] < 6.0 and timer.Timer() is one
    with pytest.raises(ValueError, match="not started"):
        one.end("other")
    one.reset()


def test_a_plugins_metrics_become_tensorboard_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from dovetail.compat.modules import logging as their_logging

    args = type(
        "Args",
        (),
        {
            "use_tensorboard": True,
            "tb_dir": str(tmp_path),
            "tb_project_name": "p",
            "tb_experiment_name": "e",
        },
    )
    their_logging.log(args, {"rollout/step": 3, "mine": 0.5, "text": "x"}, "rollout/step")
    their_logging.finish_tracking()
    events = EventAccumulator(str(tmp_path / "p" / "e"))
    events.Reload()
    (event,) = events.Scalars("mine")
    assert (event.step, event.value) == (3, 0.5)
