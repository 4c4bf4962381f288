"""Agents, each in a session that is served before the written engine.

agent(base_url, ...) --requests--> session --> written answers
  before its first answer   whatever it raises is judged as any function's
  afterwards                a written answer is no model's: only what no answer can cause is a
                            fault, the rest is noted, as is an agent that is still at work
"""

from __future__ import annotations

import builtins
import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dovetail.hooks import BoundHook
from dovetail.rollout import session
from dovetail.run.rehearse.generate import call_of, needs_logprobs, sampling_of, written
from dovetail.run.rehearse.http import middleware_of, server
from dovetail.run.rehearse.samples import check_generated, prompts
from dovetail.run.rehearse.stage import Lost, Stage
from dovetail.run.rehearse.stuck import Kind, main_stack, standstill
from dovetail.run.rehearse.verdict import Fault, Unjudged
from dovetail.types import DovetailError, Sample

if TYPE_CHECKING:
    from dovetail.router.sessions.tree import Session

_CONTEXT = 1 << 20
"""Tokens may be characters here, and agents begin with long instructions."""
_LOOK_S = 0.1
_BLOCKED_S = 1.0
"""Longest that a request may wait for a loop that stands in a library of the user's."""


def agent(hook: BoundHook, stage: Stage) -> None:
    """One sample; where prompts are made up, as text and as a chat: one of them fits."""
    found, stage.made_up = prompts(stage.config, stage.missing)
    made = written(stage, found)
    faults: list[Fault | Unjudged] = []
    with server(stage, made, made.tokenizer, middleware_of(stage), _CONTEXT):
        for prompt in _prompts_of(found[0], stage.made_up):
            sample = copy.deepcopy(found[0])
            sample.index, sample.group_index, sample.prompt = 0, 0, prompt
            try:
                _try_out(hook, stage, call_of(stage, made, sample, sampling_of(stage), False))
                return
            except (Fault, Unjudged) as fault:
                faults.append(fault)
            if stage.is_late:
                break
    raise faults[0]


def _prompts_of(sample: Sample, made_up: bool) -> list[Any]:
    if not made_up:
        return [sample.prompt]
    return [sample.prompt, [{"role": "user", "content": sample.prompt}]]


def _try_out(hook: BoundHook, stage: Stage, call: Any) -> None:
    sessions = session.sessions_of(call.args)
    opened = sessions.store.open(call.sampling)
    call.sample.session_id = opened.session_id

    def end() -> None:
        sessions.store.end(opened.session_id)

    try:
        with _watched(stage, opened, end):
            given = _given(hook, stage, session.arguments(call, opened), opened)
    finally:
        end()
    if not opened.turns:
        if stage.is_late:
            return
        text = (
            "comes back without a request that was answered: it is given the address to ask as "
            "base_url, an OpenAI client's base_url"
        )
        raise Unjudged(text) if stage.made_up else Fault(text)
    samples = sessions.collect(opened, call.sample, agent=given)
    for odd in check_generated(samples, "a sample", needs_logprobs=needs_logprobs(stage)):
        stage.warn(odd)


def _given(
    hook: BoundHook, stage: Stage, values: dict[str, Any], opened: Session
) -> Mapping[str, Any]:
    """What the agent gave back; nothing, where it was cut off or failed at a written answer."""
    values["metadata"]["rehearsal"] = True

    async def called() -> Mapping[str, Any]:
        try:
            return session.checked(await hook(**values), hook)
        except Exception as error:
            if not opened.turns and _is_of(error, values["base_url"]):
                where = stage.line_of(error)
                raise Fault(f"its session refuses a request: {error} (at {where})") from None
            if not opened.turns or _is_bug(error):
                raise
            stage.warn(
                f"raises {type(error).__name__}: {error} (at {stage.line_of(error)}) after "
                f"{_answers(opened)} that no model wrote; in the run, what is recorded until then "
                "is trained on"
            )
            return {}

    try:
        given: Mapping[str, Any] = stage.call(called)
        return given
    except (Fault, Unjudged) as why:
        if not stage.is_late:
            raise
        _tell_late(stage, opened, str(why))
        return {}
    except Lost as lost:
        raise Lost(Unjudged(f"{lost.args[0]}, and takes no cancellation")) from None


def _tell_late(stage: Stage, opened: Session, why: str) -> None:
    """Agents may take their time: that says nothing about them."""
    where = why.rpartition(" (at ")[2].rstrip(")")
    if not opened.turns:
        raise Unjudged(f"asked for nothing within {stage.timeout_s:g} s (at {where})")
    stage.warn(
        f"is still at work after {stage.timeout_s:g} s and {_answers(opened)} (at {where}): what "
        "comes then was not tried out"
    )


def _answers(opened: Session) -> str:
    count = len(opened.turns)
    return f"{count} answer{'s' * (count > 1)}"


def _is_of(error: Exception, base_url: str) -> bool:
    """Whether an HTTP client's error is a refusal of the session's."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    return str(getattr(response, "url", "")).startswith(base_url) and 400 <= status < 500


def _is_bug(error: Exception) -> bool:
    """Whether no answer, however bad, explains an error."""
    if isinstance(error, AttributeError):
        kind = type(error.obj)
        # "The match is None", "the JSON is a number": answers do that.
        return kind.__module__ not in (builtins.__name__, "re")
    return isinstance(error, NameError | ImportError | DovetailError)


@contextmanager
def _watched(stage: Stage, opened: Session, end: Callable[[], None]) -> Iterator[None]:
    """End the session if the agent waits for its answer on the loop that has to make it.

    Raises:
        Fault: it does.
    """
    over, found = threading.Event(), list[str]()

    def watch() -> None:
        last, since, longest = "", 0.0, min(_BLOCKED_S, stage.timeout_s / 2)
        while not over.wait(_LOOK_S):
            stands = standstill([main_stack()], stage.home)
            waits = opened.in_flight and stands.kind in (Kind.LIBRARY, Kind.OUTSIDE)
            where = stands.where if waits else ""
            if where != last:
                last, since = where, time.monotonic()
            elif where and time.monotonic() - since > longest:
                found.append(where)
                return end()

    thread = threading.Thread(target=watch, name="rehearsal-watch", daemon=True)
    thread.start()
    try:
        yield
    # Whatever became of it then came of that.
    except (Fault, Unjudged, Lost):
        if not found:
            raise
    finally:
        over.set()
        thread.join()
    if found:
        raise Fault(
            "waits for its session's answer on the event loop that makes it, which stands still "
            f"meanwhile (at {found[0]}): write `def` instead of `async def`, plain functions have "
            "threads of their own, or await an asynchronous client (AsyncOpenAI)"
        )
