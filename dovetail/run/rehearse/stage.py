"""Where user code is called in a rehearsal: on a clock, with what it raises told by its line."""

from __future__ import annotations

import asyncio
import gc
import linecache
import os
import time
import traceback
import warnings
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dovetail.config.run import RunConfig
from dovetail.hooks import BoundHook
from dovetail.hooks.load import blame
from dovetail.hooks.table import spec_of
from dovetail.run.rehearse.parent import IMPORTS_S, told
from dovetail.run.rehearse.stuck import imports_beside, is_users, live_stacks, standstill
from dovetail.run.rehearse.verdict import Fault, NotInRehearsal, Outcome, Unjudged
from dovetail.types import DovetailError, HookRunError

_SERVICES = frozenset(
    (
        "aiohttp",
        "httpx",
        "httpcore",
        "requests",
        "urllib3",
        "websockets",
        "grpc",
        "openai",
        "anthropic",
        "google",
        "botocore",
        "boto3",
        "redis",
        "pymongo",
        "wandb",
        "mlflow",
        "swanlab",
        "docker",
        "e2b",
        "modal",
        "huggingface_hub",
        "ray",
    )
)
"""Packages that talk to something outside: what they raise says nothing about the hook."""
_CANCEL_S = 0.3
_LOOK_S = 0.1
"""How often a waiting rehearsal looks at what is under way."""
_LEAVE_MARKS = (
    "data_source",
    "rollout_function",
    "custom_agent_function",
    "custom_generate_function",
    "rollout_sample_hook",
    "custom_rm",
)
"""Slots whose functions may put onto samples what later ones look for, in the order of the data's
way."""


class Lost(Exception):
    """User code can't be stopped: this process is of no more use."""


class Stage:
    """One hook's rehearsal: its clock, its warnings, its loop."""

    def __init__(
        self, config: RunConfig, args: Any, timeout_s: float, say: Callable[..., None]
    ) -> None:
        self.config, self.args, self.timeout_s, self._say = config, args, timeout_s, say
        self.warnings: list[str] = []
        self.home = ""
        self.source = self.slot = ""
        self.loop = asyncio.new_event_loop()
        self.is_late = False
        """A call did not come back in time: no second one is waited for."""
        self.made_up = True
        """Inputs are invented, not rows of the run's data."""
        self.missing: list[str] = []
        """What user code looked for in vain in made-up inputs."""

    def begin(self, hook: BoundHook) -> None:
        """From here on `hook` is the user's function that is rehearsed."""
        self.source, self.slot = hook.source, hook.spec.slot
        self.home = str(Path(hook.source.rpartition(":")[0]).parent) if ":" in hook.source else ""

    def is_users(self, file: str) -> bool:
        """Whether a file holds the user's code."""
        return is_users(file, self.home)

    def warn(self, text: str) -> None:
        """Worth telling, but no fault."""
        if text not in self.warnings:
            self.warnings.append(text)

    def call(self, function: Callable[..., Any], *values: Any) -> Any:
        """What `function` gives, an awaitable's result too.

        Raises:
            Fault: it raised, exited, hung, or forgot to await.
            Unjudged: something outside failed it, or it needs what a rehearsal does not have.
            Lost: it hangs and can't be stopped.
        """
        self._say(stage="call", source=self.source, home=self.home)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                got = function(*values)
                if asyncio.iscoroutine(got) or isinstance(got, Awaitable):
                    got = self._awaited(got)
            # Everything that user code can raise; its kind decides what is said.
            except (Exception, SystemExit, GeneratorExit, KeyboardInterrupt) as raised:
                raise self._judged(raised) from None
            finally:
                self._say(stage="prepare", source=self.source, home=self.home)
            gc.collect()
        self._unawaited(caught)
        return got

    def end(self) -> None:
        """End what the hook left on the loop: else its coroutines are found, never awaited, when
        the next hook is called, and it answers for them."""
        if self.loop.is_closed():
            return
        self._say(stage="call", source=self.source, home=self.home)
        # What was told of the call that it ended comes up in the loop's own task once more.
        with suppress(SystemExit, KeyboardInterrupt):
            self.loop.run_until_complete(_end_tasks())
        self._say(stage="prepare", source=self.source, home=self.home)

    def try_all(self, function: Callable[[Any], Any], inputs: dict[str, Any]) -> dict[str, Any]:
        """`function` on every named input; inputs that fail are warned about.

        Raises:
            Fault: it works on none of them; of the first.
            Unjudged: none works, and something outside is why.
        """
        good: dict[str, Any] = {}
        failures: dict[str, Fault | Unjudged] = {}
        for name, value in inputs.items():
            try:
                good[name] = function(value)
            except (Fault, Unjudged) as failure:
                if self.is_late:
                    raise
                failures[name] = failure
        if not good and failures:
            faults = [one for one in failures.values() if isinstance(one, Fault)]
            raise next(iter(faults or failures.values()))
        for name, why in failures.items():
            self.warn(f"{name}: {why}")
        return good

    def _awaited(self, awaitable: Awaitable[Any]) -> Any:
        async def outer() -> Any:
            task = asyncio.ensure_future(awaitable)
            await self._in_time(task)
            if task.done():
                return task.result()
            stuck = standstill(live_stacks(), self.home)
            outcome, message = told(stuck, self.timeout_s, "it is called")
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_S)
            self.is_late = True
            judged = Fault(message) if outcome is Outcome.FAULT else Unjudged(message)
            raise judged if task.done() else Lost(judged)

        return self.loop.run_until_complete(outer())

    async def _in_time(self, task: asyncio.Future[Any]) -> None:
        """Wait for a task; the time that a thread of its own imports a library does not count."""
        left, began = self.timeout_s, time.monotonic()
        while left > 0 and not task.done():
            since = time.monotonic()
            await asyncio.wait({task}, timeout=min(left, _LOOK_S))
            now = time.monotonic()
            if imports_beside(self.home) and now - began < IMPORTS_S:
                # The other side's clock too begins anew.
                self._say(stage="call", source=self.source, home=self.home)
            else:
                # What blocks this loop is for the other side to see.
                left -= min(now - since, 2 * _LOOK_S)

    def _judged(self, raised: BaseException) -> BaseException:
        """What is to be raised instead of what came out of a call."""
        if isinstance(raised, Fault | Unjudged | Lost):
            return raised
        error = raised
        if isinstance(raised, HookRunError):
            cause = raised.__cause__
            if cause is None or not self._own_frames(cause):
                return Fault(_short(str(raised)))
            error = cause
        elif isinstance(error, DovetailError) and not self._own_frames(error):
            return Fault(str(error))
        if isinstance(error, SystemExit):
            return Fault(f"calls sys.exit({error.code!r}) (at {self.line_of(error)})")
        name = type(error).__name__
        said = f"{name}: {error}" if str(error) else name
        if isinstance(error, NotInRehearsal):
            return Unjudged(f"{error} (at {self.line_of(error)})")
        if _outside(error):
            return Unjudged(f"something outside failed: {said} (at {self.line_of(error)})")
        if self._needs_tokenizer(error):
            return Unjudged(
                f"may need the model's tokenizer: {said} (at {self.line_of(error)}); name the "
                "model's directory: --hf-checkpoint (TOML: model.hf_checkpoint)"
            )
        if earlier := self._needs_earlier(error):
            return Unjudged(
                f"may need what the run's {earlier} puts onto samples, which a rehearsal does not "
                f"have: {said} (at {self.line_of(error)})"
            )
        if self._needs_real_data(error):
            wanted = f"needs {', '.join(self.missing)}, which" if self.missing else "may need what"
            return Unjudged(
                f"{wanted} made-up samples do not have: {said} (at {self.line_of(error)}); "
                "name the data to check with its first rows: --prompt-data (TOML: "
                "data.prompt_data)"
            )
        return Fault(f"raises {said} (at {self.line_of(error)})")

    def line_of(self, error: BaseException) -> str:
        """The user's line that raised, or that called what raised."""
        own = self._own_frames(error)
        if own:
            return f"{own[-1].filename}:{own[-1].lineno}, in {own[-1].name}"
        return blame(error, self.source.rpartition(":")[0])

    def _own_frames(self, error: BaseException) -> list[traceback.FrameSummary]:
        frames = traceback.extract_tb(error.__traceback__)
        return [frame for frame in frames if self.is_users(frame.filename)]

    def _needs_real_data(self, error: BaseException) -> bool:
        """Whether an error comes of looking for something that only the run's data has."""
        if not self.made_up or not isinstance(error, LookupError | TypeError | ValueError):
            return False
        line = self._code(error)
        if line.startswith("raise"):
            return False
        return bool(self.missing) or "label" in line or "metadata" in line

    def _needs_earlier(self, error: BaseException) -> str | None:
        """The flag of an earlier function of the run whose work an error may come of missing."""
        looked_up = isinstance(error, LookupError | TypeError | AttributeError | ValueError)
        if not looked_up or self._code(error).startswith("raise"):
            return None
        before: tuple[str, ...] = _LEAVE_MARKS
        if self.slot in before:
            before = before[: before.index(self.slot)]
        asked = [slot for slot in before if getattr(self.config.hooks, spec_of(slot).leaf)]
        return spec_of(asked[0]).flag if asked else None

    def _needs_tokenizer(self, error: BaseException) -> bool:
        """Whether an error comes of the tokenizer that foreign state objects have not without a
        model."""
        if self.config.model.hf_checkpoint is not None or not isinstance(error, AttributeError):
            return False
        return "'NoneType' object" in str(error) and "tokenizer" in self._code(error)

    def _code(self, error: BaseException) -> str:
        """The user's line that raised."""
        own = self._own_frames(error)
        return linecache.getline(own[-1].filename, own[-1].lineno or 0).strip() if own else ""

    def _unawaited(self, caught: list[warnings.WarningMessage]) -> None:
        for warning in caught:
            text = str(warning.message)
            if "was never awaited" in text and not warning.filename.startswith(os.devnull):
                raise Fault(f"forgets an await: {text}")


async def _end_tasks() -> None:
    # What other threads have handed over becomes tasks.
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_CANCEL_S)


def _outside(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that of a service, a file, the environment."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        package = type(error).__module__.partition(".")[0]
        text = str(error)
        if isinstance(error, OSError) or package in _SERVICES:
            return True
        if isinstance(error, KeyError) and _from_environ(error):
            return True
        if "CUDA" in text or "NVIDIA driver" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def _from_environ(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename in (os.__file__, "<frozen os>")


def _short(message: str) -> str:
    """Without the flag that the verdict's head names already."""
    head, colon, rest = message.partition("): ")
    return rest if colon and head.startswith("--") else message
