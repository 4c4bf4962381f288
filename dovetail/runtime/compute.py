"""The thread that computes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def compute_thread(num_threads: int) -> ThreadPoolExecutor:
    """One thread for everything heavy, training and decoding, with `num_threads` CPU threads.

    Each Python thread that runs a parallel operation gets a team of OpenMP threads of its own. With
    two teams there are more threads than processors, and the runtime lets waiting threads sleep at
    every barrier: decoding a small model on two processors was slower than on one. So the calling
    thread is held to one, and the heavy work goes to this one.
    """
    torch.set_num_threads(1)
    # Marks the number as this thread's own; else the next one set anywhere would replace it.
    torch.get_num_threads()
    return _thread("compute", num_threads)


def decode_thread(num_threads: int) -> ThreadPoolExecutor:
    """A second one, for an engine that decodes while `compute_thread` trains: the two share the
    processors, and each is slower than alone."""
    return _thread("compute-decode", num_threads)


def shared_out(num_threads: int) -> tuple[int, int]:
    """CPU threads of training and of decoding beside it."""
    decoding = max(1, num_threads // 2)
    return max(1, num_threads - decoding), decoding


def _thread(name: str, num_threads: int) -> ThreadPoolExecutor:
    thread = ThreadPoolExecutor(1, thread_name_prefix=name)
    thread.submit(torch.set_num_threads, num_threads).result()
    return thread
