"""A generate function for agents: any program that speaks the OpenAI API, in a session of its own.

    sample -> session opened -> agent(base_url, prompt, ...) -> its requests are answered and
                                                                recorded token by token
           <- samples <- session ended <- the agent returns, fails, or its time is over

Turned on by `--custom-generate-function-path agent`; the agent is `--custom-agent-function-path`.
miles' stock function of this kind. The sessions are served by the run's router, in this process.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dovetail.hooks import BoundHook, bind
from dovetail.types import ConfigError, GenerateCall, HookRunError, Sample

if TYPE_CHECKING:
    from dovetail.router.sessions.server import SessionServer
    from dovetail.router.sessions.tree import Session

log = logging.getLogger(__name__)

NAMES = (
    "agent",
    "miles.rollout.generate_hub.agentic_tool_call.generate",
    "miles.rollout.generate_hub.agentic_tool_call:generate",
)
"""Paths of a generate function under which this one runs."""
_LOOK_S = 0.25
"""How often a waiting call looks whether the step is over."""
_FAREWELL_S = 1.0
_KEY_OF_KWARG = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_new_tokens": "max_tokens",
    "stop": "stop",
    "sampling_seed": "seed",
}


@dataclass
class _Outcome:
    """How an agent's run ended."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    late: bool = False
    aborted: bool = False
    elapsed_s: float = 0.0


async def generate(call: GenerateCall) -> list[Sample]:
    """Run the agent on the sample's prompt; the samples of what its session recorded.

    One for each history that its requests had, all of one `rollout_id`; what was not sampled has
    loss mask 0. What the agent gave back is in their metadata. TRUNCATED where the last answer, the
    context or the agent's time (`agent_timeout_s`) was at its end; an agent that raised leaves what
    was recorded, with `metadata["agent_error"]`. ABORTED, to be run again, when the step is over.

    Raises:
        ConfigError: the run serves no sessions, or names no agent.
        HookRunError: the agent gave back something else than a dict or None.
        Exception: what the agent raised before its first answer.
    """
    sample, sessions, agent = call.sample, sessions_of(call.args), _agent_of(call.args)
    session = sessions.store.open(
        call.sampling, max_context_len=_max_context_len(call), evaluation=call.evaluation
    )
    sample.session_id = session.session_id
    try:
        outcome = await _run(call, agent, session)
    finally:
        sessions.store.end(session.session_id)
    if outcome.aborted:
        sample.reset_for_retry()
        return [sample]
    samples = sessions.collect(session, sample, agent=outcome.metadata)
    if not samples:
        raise outcome.error or RuntimeError(
            f"the agent {agent.path} made no request that was answered: it is given the address "
            "to ask as base_url, an OpenAI client's base_url"
        )
    if outcome.error is not None:
        log.warning(
            "the agent of sample %s raised %s: %s; the %d turns until then are kept",
            sample.index,
            type(outcome.error).__name__,
            outcome.error,
            len(session.turns),
        )
    return _told(samples, session, outcome)


def arguments(call: GenerateCall, session: Session) -> dict[str, Any]:
    """What an agent is called with."""
    return {
        "base_url": f"{_address(call.args)}/sessions/{session.session_id}",
        "prompt": call.sample.prompt,
        "request_kwargs": _request_kwargs(call),
        "metadata": _metadata(call, session),
    }


def build_chat_request_kwargs(sampling_params: Mapping[str, Any]) -> dict[str, Any]:
    """A run's sampling as keywords of `client.chat.completions.create`."""
    named = {theirs: sampling_params.get(ours) for ours, theirs in _KEY_OF_KWARG.items()}
    return {name: value for name, value in named.items() if value is not None}


def sessions_of(args: Any) -> SessionServer:
    """The session server of this run.

    Raises:
        ConfigError: there is none.
    """
    # Starlette takes a while to import: a run with sessions has done so already.
    from dovetail.router.sessions.server import SERVED

    address = f"{args.session_server_ip}:{args.session_server_port}"
    found = SERVED.get(address)
    if found is None:
        raise ConfigError(
            "agents need the run's session server, and none is served in this process; leave "
            "--serve-router (TOML: router.serve_router) at auto or true"
        )
    return found


def _told(samples: list[Sample], session: Session, outcome: _Outcome) -> list[Sample]:
    """The samples, knowing how the agent's run went."""
    metrics = outcome.metadata.get("agent_metrics")
    tool_s = metrics.get("total_tool_time") if isinstance(metrics, Mapping) else None
    waited_s = max(0.0, outcome.elapsed_s - session.busy_s)
    for sample in samples:
        sample.metadata.update(outcome.metadata)
        sample.non_generation_time = waited_s if tool_s is None else float(tool_s)
        if outcome.error is not None:
            sample.metadata["agent_error"] = f"{type(outcome.error).__name__}: {outcome.error}"
    if outcome.late or session.full:
        samples[-1].status = Sample.Status.TRUNCATED
    return samples


async def _run(call: GenerateCall, agent: BoundHook, session: Session) -> _Outcome:
    """The agent's whole run, until it is over or cut off."""
    _aborts.begin()
    started = time.monotonic()
    running = asyncio.ensure_future(agent(**arguments(call, session)))
    try:
        while not running.done() and not (call.aborted or session.aborted):
            await asyncio.wait({running}, timeout=_LOOK_S)
        outcome = _Outcome(elapsed_s=time.monotonic() - started)
    finally:
        over = call.aborted or session.aborted
        if over:
            _aborts.tell(agent, call.args)
        await _ended(running)
    if over:
        outcome.aborted = True
        return outcome
    error = running.exception()
    if isinstance(error, HookRunError):
        raise error
    if isinstance(error, Exception):
        outcome.error, outcome.late = error, isinstance(error, TimeoutError)
    else:
        outcome.metadata = checked(running.result(), agent)
    return outcome


async def _ended(running: asyncio.Future[Any]) -> None:
    """Cancelled if it still runs; a plain function in its thread goes on to its next request."""
    # What it raises because it is cut off, nobody asks about.
    running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    if not running.done():
        running.cancel()
        await asyncio.wait({running}, timeout=_FAREWELL_S)


def checked(given: Any, agent: BoundHook) -> Mapping[str, Any]:
    """What an agent gave back, if it is what is expected.

    Raises:
        HookRunError: neither a dict nor None.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise HookRunError(
            f"{agent.spec.where}: {agent.path} gave back {type(given).__name__} "
            f"({str(given)[:80]!r}); expected a dict, which is merged into sample.metadata, or None"
        )
    return given


class _Aborts:
    """Tells the agent's module once for each step that ends early."""

    def __init__(self) -> None:
        self._told = False
        self._telling: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """An agent starts, so that a step is under way."""
        self._told = False

    def tell(self, agent: BoundHook, args: Any) -> None:
        """Have `abort(args)` beside the agent called, where there is one."""
        abort = getattr(_module_of(agent.invoke.target), "abort", None)
        if self._told or not callable(abort):
            return
        self._told = True
        # The call that notices the end may be cancelled itself, and has a moment only.
        task = asyncio.ensure_future(self._call(abort, agent, args))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _call(self, abort: Callable[[Any], Any], agent: BoundHook, args: Any) -> None:
        try:
            got = abort(args)
            if inspect.isawaitable(got):
                await got
        # It only makes the end come sooner; a step that is complete is not lost over it.
        except Exception as error:
            log.warning("%s: its abort failed", agent.path, exc_info=error)


_aborts = _Aborts()


def _module_of(target: Any) -> Any:
    inner = getattr(target, "func", target)
    name = getattr(inner, "__module__", None) or type(inner).__module__
    return sys.modules.get(name)


_BOUND: dict[str, BoundHook] = {}


def _agent_of(args: Any) -> BoundHook:
    path = args.custom_agent_function_path
    if path is None:
        raise ConfigError(
            "this generate function runs an agent; name it: --custom-agent-function-path "
            "(TOML: hooks.custom_agent_function_path)"
        )
    if path not in _BOUND:
        _BOUND[path] = bind("custom_agent_function", path, args)
    return _BOUND[path]


def _address(args: Any) -> str:
    return f"http://{args.session_server_ip}:{args.session_server_port}"


def _max_context_len(call: GenerateCall) -> int | None:
    name = "eval_max_context_len" if call.evaluation else "rollout_max_context_len"
    found: int | None = getattr(call.args, name, None)
    return found


def _request_kwargs(call: GenerateCall) -> dict[str, Any]:
    named = build_chat_request_kwargs(call.sampling_params)
    variable = getattr(call.args, "router_token_env", None)
    token = os.environ.get(variable) if variable else None
    # Clients of an agent have keys of their own; this header goes before them.
    return named | ({"extra_headers": {"Authorization": f"Bearer {token}"}} if token else {})


def _metadata(call: GenerateCall, session: Session) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "session_id": session.session_id,
        "session_server_id": f"{call.args.session_server_ip}:{call.args.session_server_port}",
    }
    if session.max_context_len is not None:
        facts["max_seq_len"] = session.max_context_len
    return {**call.sample.metadata, **facts}
