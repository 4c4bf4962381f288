"""One rank of a trainer that is spread over processes: it meets the others, builds its part from
the resolved configuration, and does what all ranks are told alike.

    meet -> build -> (train -> publish | save_into | export)* -> close

Every rank gets all rows of a step; what it does of them is the trainer's matter
(`trainers/data_parallel.py`).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dovetail.batch.rows import TrainRow
from dovetail.checkpoint.hf_export import save_hf_tensors
from dovetail.checkpoint.rng import capture_rng, restore_rng, seed_all
from dovetail.checkpoint.state import decode_part, encode_part
from dovetail.config.run import RunConfig
from dovetail.hooks import ArgsView, BoundHook, bind, spec_of
from dovetail.hooks.load import admit_foreign_imports
from dovetail.run.engines import weights_store
from dovetail.run.models import Models
from dovetail.run.rank_models import ShardedModels, SkeletonModels
from dovetail.run.schedule import Schedule
from dovetail.run.training import TRAINING_SLOTS, export_critic, make_trainer
from dovetail.runtime.plan import Plan
from dovetail.trainers.data_parallel import ALONE, DataParallel
from dovetail.trainers.sums import WorstToken
from dovetail.trainers.torch.mesh import Mesh, make_mesh
from dovetail.transport.meeting import listening_at
from dovetail.transport.sender import Sender
from dovetail.types.errors import CheckpointError, EngineError, TrainError
from dovetail.types.weights import Snapshot


@dataclass(frozen=True)
class Job:
    """What every rank is told, as plain data."""

    config: dict[str, Any]
    """A resolved configuration: what was set, by section."""
    passthrough: dict[str, Any]
    facts: dict[str, Any]
    """What is known of the run beside it, for users' functions."""
    schedule: dict[str, Any]
    device: str
    num_threads: int
    """Of each rank."""
    world: int
    address: str | None = None
    """Of rank 0's machine, where engines are on others."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of one step on one rank."""

    metrics: dict[str, float]
    changed: bool
    worst_tokens: list[WorstToken]


class RankWorker:
    """Rank `rank` of the trainer of `job`."""

    def __init__(self, rank: int, job: Mapping[str, Any]) -> None:
        self.rank, self.job = rank, Job(**job)
        self.config = RunConfig.model_validate(self.job.config)
        self._store: dist.Store | None = None
        self._mesh: Mesh | None = None
        self._saved_rng = f"rng_{rank:05d}"

    # Meeting

    def there(self) -> None:
        """Answer: this process runs."""

    def invite(self, address: str) -> int:
        """Listen, on rank 0, for the others. Gives the port."""
        self._store = own = listening_at(address, self._limit, self.job.world)
        return own.port

    def meet(self, address: str, port: int) -> None:
        """Join the group of all ranks.

        Raises:
            TrainError: they did not come together in time.
        """
        torch.set_num_threads(self.job.num_threads)
        if self.job.device == "cuda":
            torch.cuda.set_device(0)
        try:
            if self._store is None:
                self._store = dist.TCPStore(
                    address, port, self.job.world, is_master=False, timeout=self._limit
                )
            dist.init_process_group(
                self._backend,
                store=dist.PrefixStore("trainer", self._store),
                rank=self.rank,
                world_size=self.job.world,
                timeout=self._limit,
            )
        except (RuntimeError, dist.DistError) as error:
            raise TrainError(
                f"trainer rank {self.rank} can't reach rank 0 at {address}:{port} from "
                f"{socket.gethostname()}: {error}"
            ) from error

    @property
    def _limit(self) -> timedelta:
        return timedelta(minutes=self.config.trainer.distributed_timeout_minutes)

    @property
    def _backend(self) -> str:
        wish = self.config.trainer.distributed_backend
        if wish != "auto":
            return wish
        return "nccl" if self.job.device == "cuda" else "gloo"

    # Building

    def build(self) -> None:
        """Load the models and make the trainer.

        Raises:
            DovetailError: as in a run of one process.
        """
        config, job = self.config, self.job
        self.args = ArgsView(config, job.passthrough, **job.facts, rank=self.rank, world=job.world)
        self.hooks = self._bound()
        self.models = self._models()
        seed_all(config.model.seed)
        trainer = make_trainer(self, Schedule(**job.schedule), lambda done, total: None)
        assert trainer is not None, "a run that trains nothing has no ranks"
        self.trainer = trainer
        self._store_of_weights: Sender | None = None

    @property
    def passthrough(self) -> dict[str, Any]:
        """Settings that are handed through."""
        return self.job.passthrough

    @property
    def parallel(self) -> DataParallel:
        """This rank's place among those that share the rows."""
        return ALONE if self._mesh is None else self._mesh.parallel

    def _models(self) -> Models:
        plan = self._plan()
        if self.job.world == 1 or self.config.trainer.train_backend == "megatron":
            # Loads what is asked for only, and Megatron reads the policy itself.
            return Models(self.config, plan)
        own = self.config.trainer
        self._mesh = make_mesh(own, self.rank, self.job.world, self.job.device)
        return ShardedModels(self.config, plan, self._mesh)

    def _plan(self) -> Plan:
        return Plan(
            mode=self.config.runtime.mode,
            device=self.job.device,
            num_threads=self.job.num_threads,
            shares_tensors=False,
        )

    def _bound(self) -> dict[str, BoundHook]:
        """The user's functions that are part of training."""
        hooks = self.config.hooks
        if hooks.compat_imports:
            admit_foreign_imports()
        paths = {slot: getattr(hooks, spec_of(slot).leaf) for slot in TRAINING_SLOTS}
        return {slot: bind(slot, path, self.args) for slot, path in paths.items() if path}

    # Work

    def train(self, rows: Sequence[TrainRow], rollout_id: int) -> Trained:
        """As `Trainer.train`."""
        metrics = self.trainer.train(rows, rollout_id)
        return Trained(metrics, self.trainer.changed, self.trainer.worst_tokens)

    def has_changed(self) -> bool:
        """Whether the latest `train` has applied a step so far."""
        return self.trainer.changed

    def save_into(self, directory: str, in_background: bool = False) -> dict[str, Any]:
        """Write this rank's part of the state; facts for `load_from`. `in_background`: come back
        when it is copied, `finish_save` waits for the files.

        Raises:
            CheckpointError: it can't be written.
        """
        place = Path(directory)
        part = encode_part(self._saved_rng, *capture_rng())
        try:
            facts = self.trainer.save_into(place, in_background=in_background)
            (place / f"{self._saved_rng}.safetensors").write_bytes(b"".join(part.tensor_chunks()))
            (place / f"{self._saved_rng}.json").write_bytes(part.facts)
        except OSError as error:
            # The same words on every rank: they are told apart by them from one that is alone.
            raise CheckpointError(f"the trainer's state was not written: {error.strerror}") from (
                error
            )
        return {**facts, "world": self.job.world}

    def has_saved(self) -> bool:
        """As `Trainer.has_saved`."""
        return self.trainer.has_saved()

    def finish_save(self) -> None:
        """As `Trainer.finish_save`."""
        self.trainer.finish_save()

    def load_from(self, directory: str, facts: Mapping[str, Any]) -> None:
        """Go on from a saved state, of any number of ranks. Generators go on where they were only
        on the same number."""
        place = Path(directory)
        self.trainer.load_from(place, facts)
        if facts.get("world") == self.job.world:
            restore_rng(*decode_part(place, self._saved_rng))

    def announce(self, version: int, num_engines: int) -> Snapshot:
        """Say where so many engines meet rank 0, which this is, for the next `publish`."""
        return self._sender.announce(version, num_engines)

    def publish(self, version: int) -> Snapshot | EngineError | None:
        """Send the weights to the engines: rank 0, while all gather them. A try that failed is told
        as a value: the ranks are none the worse for it.
        """
        tensors = self.trainer.backend.hf_tensors()
        found: Snapshot | EngineError | None = None
        if self.rank == 0:
            try:
                found = self._sender.send(version, tensors)
            except EngineError as error:
                found = error
        # All ranks gather to the end, whatever becomes of what was gathered.
        for _ in tensors:
            continue
        return found

    @property
    def _sender(self) -> Sender:
        if self._store_of_weights is None:
            models = SkeletonModels(self.config, self._plan())
            path = self.config.hooks.custom_update_weight_post_write_path
            hook = bind("custom_update_weight_post_write", path, self.args) if path else None
            self._store_of_weights = weights_store(
                models,
                self.job.address,
                # Where the engines are is known to the run's own process only.
                None if hook is None else lambda directory: hook(str(directory), []),
            )
        return self._store_of_weights

    def retire(self, version: int) -> None:
        """No engine needs weights from before this version any more."""
        if self._store_of_weights is not None:
            self._store_of_weights.retire(version)

    def export(self, path: str) -> None:
        """Write a Hugging Face directory: rank 0, while all gather."""
        origin = SkeletonModels(self.config, self._plan())
        save_hf_tensors(
            origin.model,
            self.trainer.backend.hf_tensors(),
            origin.tokenizer,
            path,
            writes=self.rank == 0,
            beside=self.trainer.backend.beside_export(),
        )

    def export_critic(self) -> None:
        """Write the critic where critic_save says."""
        export_critic(self, self.trainer)

    def offload(self) -> None:
        """Give the device's memory up until `onload`."""
        self.trainer.offload()

    def onload(self) -> None:
        """Take it again."""
        self.trainer.onload()

    def close(self) -> None:
        """Remove published weights, and leave the group."""
        store: Sender | None = getattr(self, "_store_of_weights", None)
        if store is not None:
            store.close()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
