"""Whether a run serves its engine over HTTP, and where users' functions find it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dovetail.config.async_rules import STREAMS
from dovetail.config.run import RunConfig
from dovetail.config.sections import SessionConfig
from dovetail.config.weight_rules import apart
from dovetail.hooks import ArgsView, BoundHook
from dovetail.rollout import multi_turn, session
from dovetail.types.ports import Engine, Tokenizer

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from dovetail.router.bridge import Bridge
    from dovetail.router.server import RouterServer
    from dovetail.router.sessions.server import SessionSettings
    from dovetail.run.build import Parts
    from dovetail.run.models import Models
    from dovetail.runtime.fleet import Fleet

CALLERS = (
    "rollout_function",
    "eval_function",
    "custom_generate_function",
    "custom_rm",
    "rollout_sample_hook",
    "data_source",
)
"""Slots whose functions, when they come from another framework, may call its server. A data source
may put functions of its own on samples."""
MIDDLEWARE = "router_middleware"
SERVED = {
    MIDDLEWARE,
    "custom_agent_function",
    "session_message_matcher",
    "session_sample_picker",
    "session_sample_postprocessor",
}
"""Slots whose functions the server, or whoever needs it, calls."""


class Served(Protocol):
    """A server as the run sees it."""

    @property
    def url(self) -> str: ...

    def start(self, loop: asyncio.AbstractEventLoop) -> None: ...

    def serve_on(self, loop: asyncio.AbstractEventLoop) -> None: ...

    def close(self) -> None: ...


class Serving(Protocol):
    """What is served: a run's parts, or those of `dovetail serve`."""

    config: RunConfig
    args: ArgsView
    hooks: dict[str, BoundHook]
    models: Models
    fleet: Fleet | None

    @property
    def engine(self) -> Any: ...


def hook_owners(config: RunConfig) -> set[str]:
    """What calls users' functions beside the loop; `bind_hooks` asks."""
    owners = set() if config.router.serve_router == "false" else {"router"}
    if config.hooks.custom_generate_function_path in multi_turn.NAMES:
        owners.add("multi-turn generate")
    function = config.hooks.rollout_function_path
    if function in STREAMS or (function is None and config.collects_ahead):
        owners.add("asynchronous runtime")
    if "router" in owners:
        owners.add("session server")
    if apart(config):
        owners.add("weights on disk")
    if config.trainer.train_backend == "megatron":
        owners.add("megatron")
    return owners


def needs_router(config: RunConfig, hooks: dict[str, BoundHook], bound: list[BoundHook]) -> bool:
    """Whether this run serves its engine.

    Args:
        config: its `serve_router` true or false decides.
        hooks: the run's functions by slot.
        bound: functions of single samples and evaluation sets.
    """
    wish = config.router.serve_router
    if wish != "auto":
        return wish == "true"
    callers = [hook for slot in CALLERS if (hook := hooks.get(slot)) is not None]
    if any(hook.path in session.NAMES for hook in (*callers, *bound)):
        return True
    return not SERVED.isdisjoint(hooks) or any(_is_foreign(hook) for hook in (*callers, *bound))


def _is_foreign(hook: BoundHook) -> bool:
    return any("native" not in one.form.families for one in hook.parts or (hook,))


def make_router(parts: Parts, bound: list[BoundHook]) -> RouterServer | None:
    """The server of a run that needs one. Its port is taken, and told to users' functions, at once;
    `start` serves.

    Raises:
        ConfigError: the port can't be had.
    """
    if not parts.samples or not needs_router(parts.config, parts.hooks, bound):
        return None
    return make_server(parts)


def make_server(parts: Serving, routes: Sequence[BaseRoute] = ()) -> RouterServer:
    """The server before the engines of `parts`. Its port is taken, and told to users' functions, at
    once.

    Args:
        routes: beside its own.

    Raises:
        ConfigError: the port can't be had.
    """
    # Starlette and uvicorn take a while to import: only runs that serve wait for them.
    from dovetail.router.bridge import Bridge
    from dovetail.router.limits import Limits
    from dovetail.router.security import Access
    from dovetail.router.workers import Behind

    fleet = parts.fleet

    def engine() -> Engine:
        # The server of a fleet is on the fleet's loop, as its engines are.
        return parts.engine if fleet is None else fleet.pool

    def tokenizer() -> Tokenizer:
        return parts.models.tokenizer

    bridge = Bridge(
        engine,
        tokenizer,
        model=str(parts.config.model.hf_checkpoint),
        limits=lambda: (parts.models.context_len, _vocab_size(parts.models.model)),
        routed_experts=parts.config.algorithm.use_rollout_routing_replay,
    )
    middleware = parts.hooks.get(MIDDLEWARE)
    every = () if middleware is None else middleware.parts or (middleware,)
    return with_sessions(
        bridge,
        parts.args,
        session_settings(parts.config.session, parts.hooks),
        routes=routes,
        port=parts.config.router.router_port,
        access=Access.of(parts.config.router),
        limits=Limits.of(parts.config.router),
        middleware=[middleware_maker(hook) for hook in every],
        behind=None if fleet is None else Behind(fleet.pool, fleet.connect),
    )


def with_sessions(
    bridge: Bridge,
    args: ArgsView,
    settings: SessionSettings | None = None,
    routes: Sequence[BaseRoute] = (),
    **more: Any,
) -> RouterServer:
    """A server before `bridge` with sessions, which users' functions find where `args` says then.

    Args:
        settings: of the sessions.
        routes: beside its own.
        more: as `RouterServer` takes it.

    Raises:
        ConfigError: the port can't be had.
    """
    from dovetail.router.server import RouterServer
    from dovetail.router.sessions.server import SERVED as SERVERS
    from dovetail.router.sessions.server import SessionServer

    sessions = SessionServer(bridge, settings)
    server = RouterServer(bridge, args=args, routes=[*routes, *sessions.routes()], **more)
    learn_address(args, server)
    # Where the rollout finds them.
    SERVERS[f"{server.host}:{server.port}"] = sessions
    return server


def _vocab_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def middleware_maker(hook: BoundHook) -> Callable[[Any, Any], Any]:
    """A class is constructed; a function becomes a dispatch."""
    if hook.form.makes:
        return hook.native
    from starlette.middleware.base import BaseHTTPMiddleware

    return lambda app, router: BaseHTTPMiddleware(app, dispatch=hook.native)


def session_settings(config: SessionConfig, hooks: dict[str, BoundHook]) -> SessionSettings:
    """How the run's sessions answer, record and collect."""
    from dovetail.router.sessions.message_match import loose_tool_call
    from dovetail.router.sessions.samples import Collecting
    from dovetail.router.sessions.server import SessionSettings
    from dovetail.router.sessions.store import SessionLimits

    return SessionSettings(
        limits=SessionLimits(
            most=config.max_sessions,
            idle_s=config.session_idle_s,
            memory_bytes=config.session_memory_gb * 1e9,
            turns=config.session_max_turns,
        ),
        matches=hooks.get("session_message_matcher", loose_tool_call),
        by_run=config.session_sampling == "run",
        keep_rewritten=config.session_history == "recorded",
        split_thoughts=config.session_split_thoughts,
        collecting=Collecting(
            hooks.get("session_sample_picker"), hooks.get("session_sample_postprocessor")
        ),
    )


def learn_address(args: ArgsView, server: RouterServer) -> None:
    """Tell users' functions, in every family's words."""
    for name in ("sglang_router", "vllm_router", "router", "session_server"):
        args.learn(**{f"{name}_ip": server.host, f"{name}_port": server.port})
    args.learn(use_session_server=True, session_server_addrs=[f"{server.host}:{server.port}"])
