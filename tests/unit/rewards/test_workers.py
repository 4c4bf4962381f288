import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dovetail.rewards.workers import WorkerDiedError, WorkerPool
from dovetail.types.errors import RewardError

RUDE = "tests.unit.rewards.rude_worker"
ECHO = {"do": "echo"}


def with_pool(use, *, size=1, timeout_s=20.0, module=RUDE):
    """What `use(pool)` returns; afterwards no process of the pool is left."""

    async def run():
        pool = WorkerPool(module, size=size, timeout_s=timeout_s)
        try:
            return await use(pool)
        finally:
            pids = [worker._process.pid for worker in pool._all]
            pool.close()
            for pid in pids:
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)

    return asyncio.run(run())


async def warm_up(pool):
    await asyncio.gather(*(pool.call(ECHO) for _ in range(pool.size)))


def test_workers_are_started_at_first_need_and_kept():
    async def use(pool):
        before = pool.num_alive
        await warm_up(pool)
        pids = {worker._process.pid for worker in pool._all}
        replies = await asyncio.gather(*(pool.call(ECHO) for _ in range(50)))
        return before, pids == {w._process.pid for w in pool._all}, replies, pool.num_alive

    assert with_pool(use, size=2) == (0, True, [{"did": "echo"}] * 50, 2)


@pytest.mark.parametrize("action", ["busy", "stuck in C", "sleep"])
def test_a_hang_is_killed_at_the_limit_and_its_worker_replaced(action):
    async def use(pool):
        await warm_up(pool)
        pool.timeout_s = 0.2
        with pytest.raises(TimeoutError):
            await pool.call({"do": action})
        pool.timeout_s = 20.0
        return await pool.call(ECHO), pool.num_replaced, pool.num_alive

    assert with_pool(use) == ({"did": "echo"}, 1, 1)


@pytest.mark.parametrize("action", ["exit", "sys.exit", "segfault", "eat memory", "raise"])
def test_a_request_that_kills_two_workers_is_given_up(action):
    async def use(pool):
        with pytest.raises(WorkerDiedError):
            await pool.call({"do": action})
        return await pool.call(ECHO), pool.num_replaced, pool.num_alive

    assert with_pool(use) == ({"did": "echo"}, 2, 1)


def test_what_a_worker_prints_disturbs_nobody():
    async def use(pool):
        return [await pool.call({"do": action}) for action in ("flood", "echo")]

    assert with_pool(use) == [{"did": "flood"}, {"did": "echo"}]


def test_many_hangs_in_a_row_leave_the_pool_at_full_strength():
    async def use(pool):
        await warm_up(pool)
        pool.timeout_s = 0.05
        outcomes = await asyncio.gather(
            *(pool.call({"do": "sleep"}) for _ in range(20)), return_exceptions=True
        )
        pool.timeout_s = 20.0
        await warm_up(pool)
        return {type(one) for one in outcomes}, pool.num_replaced, pool.num_alive

    assert with_pool(use, size=2) == ({TimeoutError}, 20, 2)


def test_the_event_loop_goes_on_while_workers_hang():
    async def use(pool):
        await warm_up(pool)
        pool.timeout_s = 0.5
        hang = asyncio.create_task(pool.call({"do": "busy"}))
        turns = 0
        while not hang.done():
            turns += 1
            await asyncio.sleep(0.001)
        with pytest.raises(TimeoutError):
            await hang
        return turns

    assert with_pool(use) > 20


def test_a_worker_that_died_while_idle_does_not_cost_the_answer():
    async def use(pool):
        await warm_up(pool)
        (worker,) = pool._all
        worker._process.kill()
        worker._process.wait()
        return await pool.call(ECHO), pool.num_replaced

    assert with_pool(use) == ({"did": "echo"}, 1)


def test_a_signal_to_the_whole_group_does_not_end_workers():
    async def use(pool):
        await warm_up(pool)
        (worker,) = pool._all
        for number in (signal.SIGINT, signal.SIGTERM):
            worker._process.send_signal(number)
        return await pool.call(ECHO), pool.num_replaced

    assert with_pool(use) == ({"did": "echo"}, 0)


def test_cancelling_a_call_frees_its_place():
    async def use(pool):
        await warm_up(pool)
        task = asyncio.create_task(pool.call({"do": "sleep"}))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await pool.call(ECHO)

    assert with_pool(use) == {"did": "echo"}


def test_closing_ends_calls_in_flight():
    async def use(pool):
        await warm_up(pool)
        task = asyncio.create_task(pool.call({"do": "sleep"}))
        await asyncio.sleep(0.02)
        pool.close()
        with pytest.raises((RewardError, WorkerDiedError)):
            await asyncio.wait_for(task, 20)
        with pytest.raises(RewardError, match="closed"):
            await pool.call(ECHO)

    with_pool(use)


def test_workers_see_no_secrets(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "canary")

    async def use(pool):
        await warm_up(pool)
        (worker,) = pool._all
        return Path(f"/proc/{worker._process.pid}/environ").read_bytes()

    if sys.platform == "linux":
        assert b"canary" not in with_pool(use)


def test_a_module_that_can_not_start_and_a_request_too_large_are_told():
    async def use(pool):
        with pytest.raises(ValueError, match="at most 60000"):
            await pool.call({"do": "x" * 70_000})
        await pool.call(ECHO)

    with pytest.raises(RewardError, match="can't start"):
        with_pool(use, module="tests.unit.rewards.no_such_worker")


ORPHAN = """
import asyncio, os
from dovetail.rewards.workers import WorkerPool
async def main():
    pool = WorkerPool("tests.unit.rewards.rude_worker", size=1, timeout_s=600.0)
    await pool.call({"do": "echo"})
    task = asyncio.create_task(pool.call({"do": "stuck in C"}))
    await asyncio.sleep(0.1)
    print(pool._all.copy().pop()._process.pid, flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells only Linux processes")
def test_no_worker_outlives_a_parent_that_was_killed():
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=120, cwd=root
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 20
    while _runs(int(done.stdout)):
        assert time.monotonic() < deadline, "the worker still runs"
        time.sleep(0.02)


def _runs(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
