"""Calling the user's object: in its own form, within a time limit, with errors that name it."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn

from dovetail.config.leaves import cure
from dovetail.hooks.limits import Overdue, Steps, blame_running, interrupt, time_limit
from dovetail.hooks.load import blame
from dovetail.hooks.match import Match, is_async, place
from dovetail.hooks.spec import HookSpec, OnError
from dovetail.types import DovetailError, HookRunError, Sample

_GRACE_S = 1.0
"""What a cancelled or interrupted function gets to end, before it is left behind."""


class Invoke:
    """Calls the user's object with named values, in its own form; a class is constructed once.

    A call that takes longer than the hook's limit is ended: an async function is cancelled, a plain
    one is interrupted where it stands. What does not end then is left behind.
    """

    def __init__(self, spec: HookSpec, target: Any, match: Match, args: Any) -> None:
        self.spec, self.target, self.match, self.args = spec, target, match, args
        self.is_async = is_async(target)
        self.name = getattr(target, "__qualname__", None) or type(target).__qualname__
        self._place = place(target)
        self._file = self._place.rpartition(":")[0]
        self._instance: Any = None
        self._construction = threading.Lock()

    @property
    def limit_s(self) -> float | None:
        """Seconds that one call may take; None: no limit."""
        return getattr(self.args, self.spec.time_limit, None) if self.spec.time_limit else None

    def __call__(self, **values: Any) -> Any:
        """What the function gives back; a coroutine as it is."""
        limit_s = None if self.is_async else self.limit_s
        try:
            with time_limit(limit_s, self._file, lambda where: self._late(where, values)):
                return self._refuse_generators(self._called(values))
        except Overdue as late:
            raise self._late(late.where, values) from None
        except Exception as error:
            self._tell(error, values)

    async def awaited(self, **values: Any) -> Any:
        """The result, of an async function too. A plain one runs here, on the caller's loop."""
        return await self._finish(self(**values), values)

    async def in_thread(self, **values: Any) -> Any:
        """As `awaited`, but a plain function gets a thread of its own: it may block for long."""
        if self.is_async:
            return await self.awaited(**values)
        ident: list[int] = []

        def called() -> Any:
            ident.append(threading.get_ident())
            return self._refuse_generators(self._called(values))

        future = asyncio.wrap_future(in_daemon(called))
        try:
            await asyncio.wait({future}, timeout=self.limit_s)
            if not future.done():
                where = blame_running(ident[0], self._file)
                interrupt(ident[0])
                raise self._late(where, values)
            got = future.result()
        except HookRunError:
            raise
        except Exception as error:
            self._tell(error, values)
        return await self._finish(got, values)

    def finished(self, **values: Any) -> Any:
        """The result for an owner that can't await: an async function runs on a loop of its own."""
        got = self(**values)
        if not inspect.isawaitable(got):
            return got
        return in_daemon(lambda: asyncio.run(self._finish(got, values))).result()

    def method(self, made: Any, method: str, *values: Any) -> Any:
        """A method of what the user's factory made; an async one runs on a loop of its own."""
        name = f"{self.name}.{method}"
        try:
            with time_limit(self.limit_s, self._file, lambda where: self._late(where, {}, name)):
                got = getattr(made, method)(*values)
            return self._on_a_loop(got) if inspect.isawaitable(got) else got
        except Overdue as late:
            raise self._late(late.where, {}, name) from None
        except DovetailError:
            raise
        except Exception as error:
            raise self.explain(error, name) from error

    def explain(
        self, error: BaseException, name: str | None = None, /, **values: Any
    ) -> HookRunError:
        """What the user's function raised, as an error that says which function, where, and on
        which samples."""
        return HookRunError(
            f"{self.spec.where}: {name or self.name} raised {type(error).__name__}: {error}"
            f"{about(values)} (at {blame(error, self._file, self._place)})"
        )

    def _on_a_loop(self, got: Awaitable[Any]) -> Any:
        return in_daemon(lambda: asyncio.run(self._awaited_in_time(got, {}))).result()

    def _called(self, values: dict[str, Any]) -> Any:
        values["args"] = self.args
        keywords = {name: values[name] for name in self.match.keywords}
        positional = (values[name] for name in self.match.form.positional)
        return self._callable(values)(*positional, **keywords)

    def _callable(self, values: dict[str, Any]) -> Callable[..., Any]:
        if self.match.construct is None:
            return self.target  # type: ignore[no-any-return]
        with self._construction:
            if self._instance is None:
                self._instance = self.target(*(values[name] for name in self.match.construct))
        return self._instance  # type: ignore[no-any-return]

    def _refuse_generators(self, got: Any) -> Any:
        if inspect.isasyncgen(got) or inspect.isgenerator(got):
            raise HookRunError(
                f"{self.spec.where}: {self.name} is a generator: it has `yield` in it, so calling "
                f"it runs nothing. Expected to be given back: {self.spec.returns}"
            )
        return got

    async def _finish(self, got: Any, values: dict[str, Any]) -> Any:
        if not inspect.isawaitable(got):
            return got
        try:
            return await self._awaited_in_time(got, values)
        except Overdue as late:
            raise self._late(late.where, values) from None
        except Exception as error:
            self._tell(error, values)

    async def _awaited_in_time(self, got: Awaitable[Any], values: dict[str, Any]) -> Any:
        limit_s = self.limit_s
        if limit_s is None:
            return await got
        coroutine = got if inspect.iscoroutine(got) else _coroutine(got)
        steps = Steps(coroutine, limit_s, self._file)
        task = asyncio.ensure_future(steps.run())
        try:
            await asyncio.wait({task}, timeout=limit_s)
            if steps.exited is not None:
                raise steps.exited
            if task.done():
                return task.result()
            where = _suspended_at(coroutine, self._file)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_GRACE_S)
                steps.give_up()
                task.cancel()
        raise self._late(where, values)

    def _late(self, where: str, values: dict[str, Any], name: str | None = None) -> Exception:
        assert self.spec.time_limit is not None
        text = (
            f"{self.spec.where}: {name or self.name} did not return within {self.limit_s:g} s"
            f"{about(values)}; it stands at {where}. If it needs longer: "
            f"{cure(self.spec.time_limit, 'SECONDS')}"
        )
        return HookRunError(text) if self.spec.on_error is OnError.STOP else TimeoutError(text)

    def _tell(self, error: Exception, values: dict[str, Any]) -> NoReturn:
        told = self._explained(error, values)
        if told is error:
            raise error
        raise told from error

    def _explained(self, error: Exception, values: dict[str, Any]) -> Exception:
        """Where the row says that the run ends, the error that it ends with."""
        if self.spec.on_error is not OnError.STOP or isinstance(error, DovetailError):
            return error
        return self.explain(error, **values)


def in_daemon(function: Callable[[], Any]) -> Any:
    """A future of what `function` gives in a thread that no exit waits for."""
    from concurrent.futures import Future

    future: Future[Any] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            made = context.run(function)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(made)

    threading.Thread(target=run, name="dovetail-hook", daemon=True).start()
    return future


async def _coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _suspended_at(coroutine: Coroutine[Any, Any, Any], file: str) -> str:
    """`file:line, in function` of the innermost frame of the user's file that awaits."""
    found: list[tuple[str, int, str]] = []
    inner: Any = coroutine
    while inner is not None and hasattr(inner, "cr_frame"):
        if inner.cr_frame is not None:
            code = inner.cr_frame.f_code
            found.append((code.co_filename, inner.cr_frame.f_lineno, code.co_name))
        inner = inner.cr_await
    own = [one for one in found if one[0] == file] or found
    return "{}:{}, in {}".format(*own[-1]) if own else "an unknown place"


def about(values: dict[str, Any]) -> str:
    """` (sample 3)` or ` (samples 3, 4, group 1)`: what is among the values of a call."""
    for value in values.values():
        sample = getattr(value, "sample", value)
        if isinstance(sample, Sample):
            return f" (sample {sample.index})"
    for value in values.values():
        if isinstance(value, list) and value and all(isinstance(one, Sample) for one in value):
            return f" ({_group(value)})"
    return ""


def _group(samples: list[Sample]) -> str:
    indexes = [str(sample.index) for sample in samples]
    shown = ", ".join(indexes[:8]) + (", ..." if len(indexes) > 8 else "")
    groups = {sample.group_index for sample in samples}
    one = f" of group {samples[0].group_index}" if len(groups) == 1 else ""
    return f"samples {shown}{one}"
