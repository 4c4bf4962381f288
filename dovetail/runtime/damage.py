"""Weights that nobody can load are told from engines that died of something else."""

from __future__ import annotations

import asyncio

from dovetail.config.leaves import cure
from dovetail.router.balancer.pool import Pool
from dovetail.transport.receive import check_whole
from dovetail.types.errors import EngineError
from dovetail.types.weights import Snapshot


async def damage(pool: Pool) -> str | None:
    """What is wrong with the weights that a started engine would be given; None: nothing."""
    snapshot = pool.snapshot
    if snapshot is None:
        return None
    if not snapshot.lasting:
        return None if pool.ready() else _nowhere(snapshot)
    found = await asyncio.to_thread(_damage, snapshot)
    # Newer ones came meanwhile, and these were removed.
    return found if pool.snapshot is snapshot else None


def _nowhere(snapshot: Snapshot) -> str:
    assert snapshot.meeting is not None
    return (
        f"the weights of version {snapshot.version} went hand to hand "
        f"({snapshot.meeting.transport}), and the last engine that had them is gone; have them lie "
        f"where engines that start find them: {cure('weight_transport', 'shared_memory')} or "
        "'disk'"
    )


def _damage(snapshot: Snapshot) -> str | None:
    assert snapshot.directory is not None, "what lasts lies somewhere"
    try:
        check_whole(snapshot.directory)
    except (EngineError, OSError) as error:
        return (
            f"the weights of version {snapshot.version} on their way to the engines are damaged: "
            f"{error}; no engine is at fault. Something else changes files there, or the disk is "
            f"failing: name another place: {cure('update_weight_disk_dir', 'DIR')}"
        )
    return None
