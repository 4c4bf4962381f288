"""Where a rehearsed function stands is read without harm to the process that it stands in."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dovetail.run.rehearse.stuck import Kind, read_dump, standstill, write_stacks


@contextmanager
def asked() -> Iterator[tuple[int, int]]:
    """A thread that writes stacks: the file to ask it by, and the one that it writes to."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile(buffering=0) as file:
        thread = threading.Thread(target=write_stacks, args=(reading, file.fileno()))
        thread.start()
        try:
            yield writing, file.fileno()
        finally:
            os.close(writing)
            thread.join(10)
            os.close(reading)
            assert not thread.is_alive()


def written(fd: int) -> str:
    return os.pread(fd, 1 << 26, 0).decode()


def deep(left: int) -> int:
    return left and 1 + deep(left - 1)


@pytest.mark.timeout(60)
def test_the_main_thread_comes_first_and_the_users_line_is_found() -> None:
    with asked() as (ask, dump):
        os.write(ask, b".")
        while not written(dump):
            pass
        stacks = read_dump(written(dump))
    assert [frame.name for frame in stacks[0]][-1] != "_bootstrap"
    found = standstill(stacks, os.path.dirname(__file__))
    assert found.kind is Kind.USER
    assert found.where.startswith(f"{__file__}:")


@pytest.mark.timeout(60)
def test_stacks_of_threads_that_go_on_are_read_three_hundred_times() -> None:
    """`faulthandler`'s signal handler, which reads them unheld, crashes within some hundred."""
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            deep(50)

    threads = [threading.Thread(target=go_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with asked() as (ask, dump):
            os.write(ask, b"." * 300)
            while written(dump).count("Current thread") < 300:
                over.wait(0.05)
    finally:
        over.set()
        for thread in threads:
            thread.join()
