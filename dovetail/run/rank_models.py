"""The models of one of several trainer ranks: each over all of them, none whole on any."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from dovetail.checkpoint import hf
from dovetail.config.run import RunConfig
from dovetail.run.models import Models
from dovetail.runtime.plan import Plan
from dovetail.trainers.torch.load import load_sharded
from dovetail.trainers.torch.mesh import Mesh


class ShardedModels(Models):
    """Loads each when it is first asked for, on all ranks together."""

    def __init__(self, config: RunConfig, plan: Plan, mesh: Mesh) -> None:
        super().__init__(config, plan)
        self._mesh = mesh

    @cached_property
    def model(self) -> Any:
        """The policy."""
        return self._sharded(self.config.model.hf_checkpoint, trained=True, adapted=True)

    @cached_property
    def critic(self) -> Any | None:
        """As `Models.critic`."""
        own = self.config.critic
        if not self.config.has_critic:
            return None
        return self._sharded(own.critic_load or self.config.model.hf_checkpoint, trained=True)

    def _load_model(self, path: str | None) -> Any:
        return self._sharded(path, trained=False)

    def _vocabulary(self, model: Any) -> int:
        return super()._vocabulary(model.model)

    def _takes_images(self, model: Any) -> bool:
        return super()._takes_images(model.model)

    def _sharded(self, path: str | None, trained: bool, adapted: bool = False) -> Any:
        own = self.config.model
        return load_sharded(
            str(path), self._mesh, own, self.config.trainer, trained=trained, adapted=adapted
        )

    def tokens_within(self, memory_gb: float) -> int:
        """Ranks hold no keys and values."""
        raise AssertionError("a trainer rank has no engine")


class SkeletonModels(Models):
    """Of a process whose weights are in others: names and shapes alone."""

    def _load_model(self, path: str | None) -> Any:
        own = self.config.model
        return hf.load_skeleton(str(path), own.dtype, own.trust_remote_code)
