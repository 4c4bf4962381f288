"""Ends that do not wait for what never returns."""

import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dovetail.run.leaving import users_runner, wait_for
from dovetail.types import HookRunError


def test_waiting_gives_the_result_the_error_or_what_the_check_raises():
    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        assert wait_for(pool.submit(lambda: 3), lambda: None) == 3
        with pytest.raises(TimeoutError, match="its own"):
            wait_for(pool.submit(_time_out), lambda: None)

        def overdue():
            raise HookRunError("stuck")

        with pytest.raises(HookRunError, match="stuck"):
            wait_for(pool.submit(release.wait), overdue)
        release.set()


def _time_out():
    raise TimeoutError("its own")


def test_a_task_that_refuses_to_end_and_a_thread_that_sleeps_hold_no_runner():
    async def refuse():
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                continue

    release = threading.Event()
    tasks = set()

    async def start():
        tasks.add(asyncio.ensure_future(refuse()))
        tasks.add(asyncio.ensure_future(asyncio.to_thread(release.wait)))
        await asyncio.sleep(0.05)

    started = time.monotonic()
    with users_runner() as runner:
        runner.run(start())
    assert time.monotonic() - started < 20
    release.set()


def test_leaving_ends_a_process_whose_thread_is_stuck():
    code = (
        "import threading, time\n"
        "from dovetail.run.leaving import leave\n"
        "threading.Thread(target=time.sleep, args=(1000,), name='user-code-1').start()\n"
        "print('told', flush=False)\n"
        "leave(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "told\n")
