"""What it costs to give two engines new weights, on each way, beside a copy of memory.

    python benchmarks/publish.py                         # 1 GB of float32, 2 receivers
    python benchmarks/publish.py --json publish.json --gb 0.25 --rounds 3

Two processes hold tensors of the model's size and take what is sent into them with the very code of
an engine (`transport.receive`, `transport.hand_over`). A round is timed from the first byte until
both have all of it; before each, one copy of as many bytes within this process is timed (one
thread, pages warm). The figure is the median of the rounds. Two ratios compare it with the median
copy: of what all receivers got together (2 GB, of a model of 1 GB and two engines), and of the
model as if it had been sent once. Two rounds before are not counted: they make pages and files.

`delta` is a bfloat16 model of half the bytes, in which an optimizer's step of 1e-6 moves float32
masters between two rounds; its bytes are told too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy
import torch

from dovetail.transport.chain import arriving
from dovetail.transport.hand_over import handed_over
from dovetail.transport.place import Wanted
from dovetail.transport.receive import SnapshotReader
from dovetail.transport.sender import Sender, make_sender
from dovetail.types.weights import MEETINGS, Snapshot

WAYS = ("shared_memory", "cuda_ipc", "broadcast", "disk", "delta")
UNCOUNTED = 2
NUM_TENSORS = 64
LEARNING_RATE = 1e-6


@dataclass
class Figures:
    """Of one way."""

    way: str
    gigabytes: float
    seconds: float
    memcpy_seconds: float
    ratio: float
    """Bytes that all receivers got, per second, to bytes that memcpy copies."""
    ratio_once: float
    """The same with the bytes of one."""
    sent_bytes: float
    """Of one version, of all bytes."""
    rounds: list[float]


def model(num_bytes: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A model's worth of tensors."""
    torch.manual_seed(0)
    size = num_bytes // NUM_TENSORS // dtype.itemsize
    return {
        f"model.layers.{number}.weight": (torch.randn(size) * 0.02).to(dtype)
        for number in range(NUM_TENSORS)
    }


def receiver(pipe: Connection, num_bytes: int, dtype_name: str) -> None:
    """An engine's side."""
    torch.set_num_threads(1)
    held, reader, state = model(num_bytes, getattr(torch, dtype_name)), SnapshotReader(), None
    while (snapshot := pipe.recv()) is not None:
        state = taken(snapshot, held, reader, state)
        pipe.send(snapshot.version)


def taken(
    snapshot: Snapshot, held: dict[str, torch.Tensor], reader: SnapshotReader, state: str | None
) -> str | None:
    """Copy all of it; what is held now."""
    if snapshot.meeting is not None:
        for name, tensor in handed_over(snapshot.meeting, torch.device("cpu"), _any, _none):
            held[name].copy_(tensor)
        return None
    assert snapshot.directory is not None
    with arriving(reader, snapshot.directory, state, held.get) as coming:
        for name, tensor in coming.tensors:
            held[name].copy_(tensor)
        return coming.state


def _any(name: str, shape: tuple[int, ...]) -> None:
    pass


def _none() -> None:
    pass


def copied_s(source: Any, place: Any) -> float:
    """One copy of memory."""
    began = time.perf_counter()
    numpy.copyto(place, source)
    return time.perf_counter() - began


def published_s(
    sender: Sender, version: int, weights: dict[str, torch.Tensor], pipes: list[Connection]
) -> tuple[float, Snapshot]:
    """From the first byte until everybody has all of it."""
    began = time.perf_counter()
    if sender.meets:
        announced = sender.announce(version, len(pipes))
        for pipe in pipes:
            pipe.send(announced)
        snapshot = sender.send(version, weights.items())
    else:
        snapshot = sender.send(version, weights.items())
        for pipe in pipes:
            pipe.send(snapshot)
    for pipe in pipes:
        assert pipe.recv() == version
    seconds = time.perf_counter() - began
    sender.retire(version)
    return seconds, snapshot


def trained(masters: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    """A step of Adam's size at the learning rate, of float32 masters; weights are rounded."""
    for name, master in masters.items():
        master += LEARNING_RATE * torch.randn_like(master).sign_()
        weights[name].copy_(master)


def measured(way: str, arguments: argparse.Namespace, place: Path) -> Figures:
    """One way."""
    delta = way == "delta"
    num_bytes = int(arguments.gb * 1e9) // (2 if delta else 1)
    dtype = torch.bfloat16 if delta else torch.float32
    weights = model(num_bytes, dtype)
    masters = {name: one.float() for name, one in weights.items()} if delta else {}
    wanted = Wanted(
        "disk" if delta else way,
        None if way in MEETINGS else place,
        num_bytes=num_bytes,
        bucket_bytes=arguments.bucket_mb << 20,
        delta=delta,
    )
    (place / "model").mkdir(exist_ok=True)
    sender = make_sender(replace(wanted, locks=True), place / "model")
    source = numpy.ones(num_bytes, numpy.uint8)
    target = numpy.zeros(num_bytes, numpy.uint8)
    seconds, copies, snapshot = [], [], None
    with receivers(arguments.receivers, num_bytes, str(dtype).removeprefix("torch.")) as pipes:
        for version in range(1, UNCOUNTED + arguments.rounds + 1):
            if delta:
                trained(masters, weights)
            copy = copied_s(source, target)
            took, snapshot = published_s(sender, version, weights, pipes)
            if version > UNCOUNTED:
                seconds.append(took)
                copies.append(copy)
    sender.close()
    assert snapshot is not None
    median, copy = statistics.median(seconds), statistics.median(copies)
    share = snapshot.num_bytes / num_bytes
    once = copy / median
    together = once * arguments.receivers
    return Figures(way, num_bytes / 1e9, median, copy, together, once, share, seconds)


class receivers:
    """The processes that take weights."""

    def __init__(self, number: int, num_bytes: int, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(number):
            own, its = context.Pipe()
            process = context.Process(target=receiver, args=(its, num_bytes, dtype), daemon=True)
            process.start()
            its.close()
            self._pipes.append(own)
            self._processes.append(process)

    def __enter__(self) -> list[Connection]:
        return self._pipes

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            with _gone():
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


class _gone:
    """A receiver that is gone needs no end."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        return kind is not None and issubclass(kind, OSError)


def lines(found: list[Figures]) -> Iterator[str]:
    """A table for docs."""
    yield "| way | bytes written or sent | seconds (median) | of memcpy, all receivers | once |"
    yield "|---|---|---|---|---|"
    for one in found:
        size = f"{one.sent_bytes:.1%} of {one.gigabytes:.2f} GB"
        yield f"| {one.way} | {size} | {one.seconds:.2f} | {one.ratio:.2f} | {one.ratio_once:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gb", type=float, default=1.0, help="10^9 bytes of float32")
    parser.add_argument("--receivers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dir", type=Path, help="for files on a disk; default: a temporary one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as place:
        for way in arguments.ways:
            found.append(measured(way, arguments, Path(place)))
            print(f"{way}: {found[-1].seconds:.3f} s, {found[-1].ratio:.2f} of memcpy", flush=True)
    print(f"\n{os.cpu_count()} processors, {arguments.receivers} receivers\n")
    print("\n".join(lines(found)))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in found], indent=1))


if __name__ == "__main__":
    main()
