"""What `dovetail serve` consists of: a model, engines and a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from dovetail.checkpoint import hf
from dovetail.checkpoint.manager import load_checkpoint
from dovetail.config.notes import SERVER_HOOKS
from dovetail.config.resolve import Resolved
from dovetail.config.run import RunConfig
from dovetail.config.sections import HooksConfig
from dovetail.hooks import ArgsView, BoundHook, bind_hooks
from dovetail.router import worker_control
from dovetail.run.embedded import make_serving
from dovetail.run.models import Models
from dovetail.run.restored import restore_policy, untrained
from dovetail.run.serving import make_server
from dovetail.run.steered import SteeredEngine
from dovetail.runtime.compute import compute_thread
from dovetail.runtime.machine import cluster_here
from dovetail.runtime.plan import serving_plan

if TYPE_CHECKING:
    from dovetail.engines.embedded.engine import EmbeddedEngine

_OWNERS = ("router", "session server", "weights on disk")
_BEFORE_READING = "sglang_custom_pull_weights_pre_read_hook"


class ServedParts:
    """One embedded engine of this process, or a fleet, and the server before it.

    The server's port is taken, and the settings of engines and hooks are checked, as soon as the
    object exists; the model is read when it is first asked for.

    Raises:
        DovetailError: a hook, an engine's settings or the port is at fault.
    """

    def __init__(self, resolved: Resolved) -> None:
        resolved = untrained(resolved)
        self.config = config = resolved.config
        self.args = ArgsView(config, resolved.passthrough)
        self.hooks: dict[str, BoundHook] = bind_hooks(_hooks_of_server(config), self.args, _OWNERS)
        self.plan = serving_plan(config, cluster_here(config))
        self.models: Models = Models(config, self.plan)
        self.fleet = None
        routes = worker_control.routes(
            SteeredEngine(
                lambda: self.engine,
                lambda: self.models.model,
                self.hooks[_BEFORE_READING].native if _BEFORE_READING in self.hooks else None,
            )
        )
        if config.engine.in_processes:
            # Of no use to the many engines that run without one.
            from dovetail.run.engines import make_fleet

            self.models, routes = FarModels(config, self.plan), []
            self.fleet = make_fleet(config, self.models, resolved.passthrough)
        self.compute = compute_thread(self.plan.num_threads)
        self.server = make_server(self, routes)

    @cached_property
    def engine(self) -> EmbeddedEngine:
        """The engine of this process."""
        return make_serving(self.models, self.compute)

    @cached_property
    def step(self) -> int:
        """Steps behind the weights of `load`, which the model has from now on; 0 without."""
        load = self.config.checkpoint.load
        if load is None:
            return 0
        checkpoint = load_checkpoint(load)
        restore_policy(self.models.model, checkpoint)
        return checkpoint.step

    @property
    def weights(self) -> Callable[[], Iterable[tuple[str, torch.Tensor]]]:
        """Makes iterators over them, for engines of other processes."""
        from dovetail.run.engines import weights_of

        return weights_of(self.models)


class FarModels(Models):
    """Of engines that read the model themselves: here it has no numbers, or, where those of a
    checkpoint are to be handed on, they are in this machine's memory."""

    def _load_model(self, path: str | None) -> Any:
        settings = self.config.model
        if self.config.checkpoint.load is None:
            return hf.load_skeleton(str(path), settings.dtype, settings.trust_remote_code)
        return hf.load_model(str(path), settings.dtype, "cpu", settings.trust_remote_code)


def _hooks_of_server(config: RunConfig) -> HooksConfig:
    """The functions that a server calls."""
    given = SERVER_HOOKS & config.hooks.model_fields_set
    return HooksConfig(**{leaf: getattr(config.hooks, leaf) for leaf in given})
