"""From a matched function to a callable in the native form of its slot."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dovetail.hooks import returns
from dovetail.hooks.load import blame
from dovetail.hooks.match import Match, is_async, place
from dovetail.hooks.spec import HookSpec, OnError
from dovetail.types import (
    DovetailError,
    DynamicFilterOutput,
    EvalOutput,
    GenerateCall,
    Group,
    HookRunError,
    RolloutCall,
    RolloutOutput,
    Sample,
)


class Invoke:
    """Calls the user's object with named values, in its own form; a class is constructed once."""

    def __init__(self, spec: HookSpec, target: Any, match: Match, args: Any) -> None:
        self.spec, self.target, self.match, self.args = spec, target, match, args
        self.is_async = is_async(target)
        self._instance: Any = None

    def __call__(self, **values: Any) -> Any:
        values["args"] = self.args
        form = self.match.form
        keywords = {name: values[name] for name in self.match.keywords}
        try:
            return self._callable(values)(*(values[name] for name in form.positional), **keywords)
        except Exception as error:
            raise self._explained(error) from error

    async def awaited(self, **values: Any) -> Any:
        """The result, of an async function too. A plain one runs here, on the caller's loop."""
        return await self._finish(self(**values))

    async def in_thread(self, **values: Any) -> Any:
        """As `awaited`, but a plain function gets a thread: it may block for long."""
        if self.is_async:
            return await self.awaited(**values)
        return await self._finish(await asyncio.to_thread(self, **values))

    def finished(self, **values: Any) -> Any:
        """The result for an owner that can't await: an async function runs on a loop of its own."""
        got = self(**values)
        if not inspect.isawaitable(got):
            return got
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(asyncio.run, self._finish(got)).result()

    async def _finish(self, got: Any) -> Any:
        try:
            return await got if inspect.isawaitable(got) else got
        except Exception as error:
            raise self._explained(error) from error

    def _callable(self, values: dict[str, Any]) -> Callable[..., Any]:
        if self.match.construct is None:
            return self.target  # type: ignore[no-any-return]
        if self._instance is None:
            self._instance = self.target(*(values[name] for name in self.match.construct))
        return self._instance  # type: ignore[no-any-return]

    def _explained(self, error: Exception) -> Exception:
        """Where the row says that the run ends, the error that it ends with."""
        if self.spec.on_error is not OnError.STOP or isinstance(error, DovetailError):
            return error
        file = place(self.target).rpartition(":")[0]
        return HookRunError(
            f"{self.spec.where}: {getattr(self.target, '__qualname__', self.target)} raised "
            f"{type(error).__name__}: {error} (at {blame(error, file)})"
        )


def adapt(spec: HookSpec, invoke: Invoke) -> Callable[..., Any]:
    """A callable in the native form of the slot of `spec`."""
    return _ADAPTERS[spec.slot](spec, invoke)


def _rollout(spec: HookSpec, invoke: Invoke) -> Callable[[RolloutCall], Awaitable[RolloutOutput]]:
    async def collect(call: RolloutCall) -> RolloutOutput:
        return returns.rollout_output(spec, await invoke.in_thread(**_rollout_values(call, invoke)))

    return collect


def _evaluation(spec: HookSpec, invoke: Invoke) -> Callable[[RolloutCall], Awaitable[EvalOutput]]:
    async def evaluate(call: RolloutCall) -> EvalOutput:
        call = dataclasses.replace(call, evaluation=True)
        return returns.eval_output(spec, await invoke.in_thread(**_rollout_values(call, invoke)))

    return evaluate


def _rollout_values(call: RolloutCall, invoke: Invoke) -> dict[str, Any]:
    return {
        "call": dataclasses.replace(call, args=invoke.args),
        "rollout_id": call.rollout_id,
        "data_source": call.data_source,
        "evaluation": call.evaluation,
    }


def _generate(
    spec: HookSpec, invoke: Invoke
) -> Callable[[GenerateCall], Awaitable[Sample | list[Sample]]]:
    async def generate(call: GenerateCall) -> Sample | list[Sample]:
        made = await invoke.in_thread(
            call=dataclasses.replace(call, args=invoke.args),
            sample=call.sample,
            sampling_params=call.sampling_params,
            evaluation=call.evaluation,
        )
        made = getattr(made, "samples", made)
        samples = list(made) if isinstance(made, list | tuple) else [made]
        if not samples or not all(isinstance(sample, Sample) for sample in samples):
            raise returns.wrong(spec, made)
        return samples if isinstance(made, list | tuple) else samples[0]

    return generate


def _reward(spec: HookSpec, invoke: Invoke) -> Callable[[Sample], Awaitable[Any]]:
    async def score(sample: Sample) -> Any:
        return await invoke.awaited(sample=sample)

    return score


def _group_reward(spec: HookSpec, invoke: Invoke) -> Callable[[Group], Awaitable[list[Any]]]:
    async def score_group(samples: Group) -> list[Any]:
        if invoke.match.form.batched:
            got = await invoke.awaited(samples=samples)
        else:
            got = await asyncio.gather(*(invoke.awaited(sample=sample) for sample in samples))
        return returns.reward_list(spec, got, len(samples))

    return score_group


def _rewards(spec: HookSpec, invoke: Invoke) -> Callable[..., Awaitable[Any]]:
    by_group = getattr(invoke.args, "group_rm", False)
    return _group_reward(spec, invoke) if by_group else _reward(spec, invoke)


def _group_filter(
    spec: HookSpec, invoke: Invoke
) -> Callable[[Group], Awaitable[DynamicFilterOutput]]:
    async def keep(group: Group) -> DynamicFilterOutput:
        return returns.filter_output(spec, await invoke.awaited(group=group))

    return keep


def _buffer_filter(spec: HookSpec, invoke: Invoke) -> Callable[[list[Group], int], list[Group]]:
    def take(buffer: list[Group], num_samples: int) -> list[Group]:
        waiting = list(buffer)
        got = invoke.finished(
            buffer=buffer, num_samples=num_samples, rollout_id=None, samples=waiting
        )
        if not isinstance(got, list | tuple):
            raise returns.wrong(spec, got)
        if "num_samples" in invoke.match.form.positional:
            return list(got)
        # This form can't know how many are wanted: it says what stays, and in which order.
        buffer[:] = got
        taken = buffer[:num_samples]
        del buffer[:num_samples]
        return taken

    return take


def _reward_post_process(
    spec: HookSpec, invoke: Invoke
) -> Callable[[list[Sample]], tuple[list[float], list[float]]]:
    def post_process(samples: list[Sample]) -> tuple[list[float], list[float]]:
        return returns.reward_pair(spec, invoke.finished(samples=samples), len(samples))

    return post_process


_ADAPTERS: dict[str, Callable[[HookSpec, Invoke], Callable[..., Any]]] = {
    "rollout_function": _rollout,
    "eval_function": _evaluation,
    "custom_generate_function": _generate,
    "custom_rm": _rewards,
    "dynamic_sampling_filter": _group_filter,
    "buffer_filter": _buffer_filter,
    "custom_reward_post_process": _reward_post_process,
}
