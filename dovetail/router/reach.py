"""Whether an engine that joins can have the weights of the run: who is on another machine reads no
memory of this one."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from dovetail.config.leaves import cure
from dovetail.transport.place import SHARED_MEMORY
from dovetail.types.weights import Snapshot


def out_of_reach(url: str, snapshot: Snapshot | None) -> str | None:
    """Why the engine at `url` can't have these weights, and the cure; None: it may."""
    if snapshot is None or not _in_memory(snapshot) or _is_here(url):
        return None
    return (
        "it is on another machine, and this run hands weights on in the memory of its own; begin "
        f"the run with {cure('weight_transport', 'broadcast')}, or with "
        f"{cure('weight_transport', 'disk')} and an {cure('update_weight_disk_dir', 'DIR')} that "
        "both machines see"
    )


def _in_memory(snapshot: Snapshot) -> bool:
    if snapshot.meeting is not None:
        return snapshot.meeting.transport == "cuda_ipc"
    return snapshot.directory is not None and SHARED_MEMORY in snapshot.directory.parents


def _is_here(url: str) -> bool:
    """Whether a socket of this machine can have the address; a name that nobody knows may be."""
    host = urlsplit(url).hostname or ""
    try:
        found = {one[4][0]: one[0] for one in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return True
    return any(_can_have(family, str(address)) for address, family in found.items())


def _can_have(family: int, address: str) -> bool:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
