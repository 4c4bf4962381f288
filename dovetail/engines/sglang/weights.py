"""Weights to SGLang over a process group of both, its way between GPUs.

    init(...)  ------> both sides join one group (NCCL)
    update(...) -----> SGLang waits for one broadcast per tensor, in the order of `names`
    destroy(...) ----> both leave it

These routes have run against a server of the tests only, which checks their schema: a group needs
GPUs on both sides. Weights of a machine without go as directories (`SglangEngine.load_snapshot`).

SGLang's fourth way, `/update_weights_from_tensor`, is not here: its tensors are Python pickles
(sglang/srt/utils/common.py, MultiprocessingSerializer), which run code in whoever reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dovetail.config.leaves import cure
from dovetail.engines.http import EngineRefusedError, HttpClient
from dovetail.types.errors import BrokenUpdateError, EngineError
from dovetail.types.weights import Meeting

_GROUP = "dovetail_weights"
_INIT_S = 300.0
_UPDATE_S = 1800.0
_BROKE_OFF, _NO_ROUTE = 409, (404, 405, 501)


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What SGLang must know of a tensor before it comes."""

    name: str
    """Its Hugging Face name."""
    dtype: str
    """`bfloat16`, `float32`, ..."""
    shape: tuple[int, ...]


async def meet(http: HttpClient, meeting: Meeting, version: int, timeout_s: float) -> None:
    """Have a `dovetail serve` take weights hand to hand (`transport.hand_over`), which SGLang has
    no route for.

    Raises:
        BrokenUpdateError: it broke off without any fault of this server.
        EngineError: the server knows no such route, or has another model.
    """
    body = {**asdict(meeting), "weight_version": str(version)}
    try:
        await http.post("/meet_for_weights", body, timeout_s=timeout_s)
    except EngineRefusedError as error:
        if error.status == _BROKE_OFF:
            raise BrokenUpdateError(str(error)) from error
        if error.status in _NO_ROUTE:
            raise EngineError(
                f"{http.url} takes no weights by {meeting.transport}: only `dovetail serve` does; "
                f"use {cure('weight_transport', 'disk')}"
            ) from error
        raise


class WeightGroups:
    """Asks a server to join, use and leave a group. The trainer's side does the same with torch."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def init(
        self, address: str, port: int, *, rank_offset: int, world_size: int, backend: str = "nccl"
    ) -> None:
        """Have it join; returns when all `world_size` members have.

        Args:
            address: of the member with rank 0.
            port: where that one listens.
            rank_offset: rank of this server's first worker.
            world_size: members of the group, the trainer among them.
            backend: `nccl`, or `gloo` where SGLang was built for CPUs.

        Raises:
            EngineError: it could not.
        """
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": _GROUP,
            "backend": backend,
        }
        await self._done("/init_weights_update_group", body, _INIT_S)

    async def update(self, tensors: Sequence[TensorFacts], version: int) -> None:
        """Have it take one broadcast per tensor, from rank 0 and in this order; to be awaited
        beside the broadcasts themselves.

        Raises:
            EngineError: it did not take them all.
        """
        body = {
            "names": [one.name for one in tensors],
            "dtypes": [one.dtype for one in tensors],
            "shapes": [list(one.shape) for one in tensors],
            "group_name": _GROUP,
            "flush_cache": True,
            "weight_version": str(version),
        }
        await self._done("/update_weights_from_distributed", body, _UPDATE_S)

    async def destroy(self) -> None:
        """Have it leave.

        Raises:
            EngineError: it was in no such group.
        """
        await self._done("/destroy_weights_update_group", {"group_name": _GROUP}, _INIT_S)

    async def _done(self, path: str, body: dict[str, Any], timeout_s: float) -> None:
        answer = await self._http.post(path, body, timeout_s=timeout_s)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise EngineError(f"SGLang at {self._http.url} ({path}) did not: {answer}")
