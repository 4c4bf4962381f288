"""Processes of a run that lives on Ray, as /proc shows them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dovetail.engines.process import processes_below


def processes_of(pid: int) -> list[str]:
    """What runs below a process, as `pid: command`; the helpers of Python's own left out."""
    found = []
    for child in processes_below(pid):
        words = command(child)
        if words and "resource_tracker" not in words:
            found.append(f"{child}: {words[:100]}")
    return found


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """What runs below this process at the end did so before: servers that other tests keep."""
    before = set(processes_of(os.getpid()))
    yield
    assert set(processes_of(os.getpid())) - before == set()


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def holding(run_dir: Path) -> dict[str, int]:
    """The process that writes each log of the run's actors, by the log's name without ending."""
    found = {}
    for one in Path("/proc").iterdir():
        if not one.name.isdigit():
            continue
        try:
            target = os.readlink(one / "fd" / "1")
        except OSError:
            continue
        path = Path(target)
        if path.parent == run_dir / "logs" and "ray::" in command(int(one.name)):
            found[path.stem] = int(one.name)
    return found


def serving(run_dir: Path, engine: int) -> int:
    """The process of an engine of the run that is a `dovetail serve`."""
    for one in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if one.name.isdigit() and "-m dovetail serve" in command(int(one.name)):
                log = Path(os.readlink(one / "fd" / "1"))
                words = command(int(one.name)).split()
                if log == run_dir / "engines" / f"engine_{engine}.log" and "-m" in words[1:2]:
                    return int(one.name)
    raise LookupError(f"engine {engine} does not run")


@contextlib.contextmanager
def two_nodes() -> Iterator[str]:
    """As `two_raylets`; its address."""
    with two_raylets() as (cluster, _second):
        yield str(cluster.address)


@contextlib.contextmanager
def two_raylets() -> Iterator[tuple[Any, Any]]:
    """A Ray cluster of two raylets on this machine, and the second of them."""
    from dovetail.runtime.ray.cluster import import_ray

    import_ray(alone=True)
    from ray.cluster_utils import Cluster

    sizes = {"num_cpus": 4, "object_store_memory": 256 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=sizes)
    try:
        second = cluster.add_node(num_cpus=4, object_store_memory=256 << 20)
        cluster.wait_for_nodes()
        yield cluster, second
    finally:
        cluster.shutdown()
