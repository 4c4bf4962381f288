"""vLLM's weight transfer, seen from the trainer: `/init_weight_transfer_engine`,
`/start_weight_update`, `/update_weights`, `/finish_weight_update`.

`load` is the way of a snapshot, with the receiver in `in_server`; it runs on CPU and GPU. `init`,
`start`, `update` and `finish` are the calls one by one, for vLLM's own ways between GPUs (`nccl`,
`ipc`): what travels beside them, the broadcast or the memory handles, is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dovetail.engines.http import EngineRefusedError, HttpClient
from dovetail.types.errors import EngineError
from dovetail.types.weights import Snapshot

_CONTROL_S = 120.0
_LOAD_S = 1800.0
_REFUSED = "snapshot refused"
"""As `in_server/dovetail_vllm_receiver.py` says it."""
_ACTIVE = "already active"


@dataclass(frozen=True, slots=True)
class NcclGroup:
    """Where trainer and workers meet for vLLM's `nccl` backend. The trainer is rank 0.

    Not run on a GPU yet; the fields are those of vLLM 0.32's NCCLWeightTransferInitInfo.
    """

    master_address: str
    master_port: int
    world_size: int
    """The trainer and every worker of every engine."""
    rank_offset: int
    """Rank of this engine's first worker."""
    packed: bool = True


@dataclass(frozen=True, slots=True)
class TensorNames:
    """What one `/update_weights` of `nccl` or `ipc` carries, in the order it is sent."""

    names: Sequence[str]
    dtype_names: Sequence[str]
    """As torch spells them, without `torch.`: `bfloat16`."""
    shapes: Sequence[Sequence[int]]


class WeightTransfer:
    """The calls of one server. Used from one asyncio loop, one update at a time."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def version(self) -> str | None:
        """The version that the server says, in its own words; None: it was told none."""
        info = await self._http.get("/weight_info", timeout_s=_CONTROL_S)
        said = info.get("weight_version") if isinstance(info, Mapping) else None
        return None if said in (None, "default") else str(said)

    async def world_size(self) -> int:
        """Workers of this server, all its replicas together."""
        return int((await self._http.get("/get_world_size", timeout_s=_CONTROL_S))["world_size"])

    async def load(self, snapshot: Snapshot) -> None:
        """Have every worker read a snapshot, then forget all keys and values, of requests under way
        too. Call while paused.

        Raises:
            EngineError: the workers refused it, and have their old weights still; or it broke off
                in the middle, and the server's version says so.
        """
        await self.start()
        update = {"directory": str(snapshot.directory), "num_bytes": snapshot.num_bytes}
        try:
            await self.update(update, timeout_s=_LOAD_S)
            await self.finish(str(snapshot.version))
            await self._forget()
        except EngineRefusedError as error:
            if _REFUSED not in error.said:
                await self.stamp(f"damaged by {snapshot.version}")
            raise EngineError(
                f"weights of version {snapshot.version} did not reach {self._http.url}: {error}"
            ) from error

    async def init(self, init_info: NcclGroup | Mapping[str, Any]) -> None:
        """Set up a transfer between GPUs; once. Not run on a GPU yet.

        For `nccl` the call returns when all ranks have met, so the trainer must join meanwhile; for
        `ipc` it is `{"packed": bool}`.
        """
        info = asdict(init_info) if isinstance(init_info, NcclGroup) else dict(init_info)
        await self._http.post(
            "/init_weight_transfer_engine", {"init_info": info}, timeout_s=_LOAD_S
        )

    async def start(self) -> None:
        """Begin an update; one that somebody left open is ended first."""
        try:
            await self._http.post("/start_weight_update", timeout_s=_CONTROL_S, last=True)
        except EngineRefusedError as error:
            if _ACTIVE not in error.said:
                raise
            await self._http.post("/finish_weight_update", {}, timeout_s=_CONTROL_S)
            await self._http.post("/start_weight_update", timeout_s=_CONTROL_S)

    async def update(
        self, update_info: TensorNames | Mapping[str, Any], *, timeout_s: float = _LOAD_S
    ) -> None:
        """Have the workers take tensors. With `nccl` (not run on a GPU yet) the call returns when
        the trainer has broadcast all of them, so it must do so meanwhile."""
        info = asdict(update_info) if isinstance(update_info, TensorNames) else dict(update_info)
        await self._http.post(
            "/update_weights", {"update_info": info}, timeout_s=timeout_s, last=True
        )

    async def finish(self, version: str) -> None:
        """End the update; tokens from here on are of this version."""
        await self._http.post(
            "/finish_weight_update", {"weight_version": version}, timeout_s=_LOAD_S, last=True
        )

    async def stamp(self, version: str) -> None:
        """Say a version without an update."""
        await self._http.post(
            "/update_weight_version", {"new_version": version}, timeout_s=_CONTROL_S
        )

    async def _forget(self) -> None:
        """Keys and values, also of requests that are held: they are computed again."""
        done = await self._http.post(
            "/reset_prefix_cache?reset_running_requests=true", timeout_s=_CONTROL_S, last=True
        )
        if not done.get("success", False):
            raise EngineError(f"{self._http.url} kept keys and values of older weights")
