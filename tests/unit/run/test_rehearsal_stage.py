"""The stage on which one hook is rehearsed leaves nothing behind for the next one."""

from __future__ import annotations

import asyncio
import gc
import warnings

from dovetail.config.run import RunConfig
from dovetail.hooks import ArgsView
from dovetail.run.rehearse.stage import Stage


async def asked_late() -> None:
    await asyncio.sleep(60)


def test_what_a_hook_leaves_on_the_loop_is_ended_with_its_rehearsal() -> None:
    config = RunConfig()
    stage = Stage(config, ArgsView(config), 1.0, lambda **message: None)
    # As a server's thread hands over a request that comes after the function has come back.
    handed_over = asyncio.run_coroutine_threadsafe(asked_late(), stage.loop)
    stage.end()
    assert handed_over.cancelled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stage.loop.close()
        del stage, handed_over
        gc.collect()
    assert not [str(one.message) for one in caught if "never awaited" in str(one.message)]
