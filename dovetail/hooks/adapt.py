"""From a matched function to a callable in the native form of its slot: the rollout's side."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

from dovetail.hooks import returns
from dovetail.hooks.adapt_training import TRAINING
from dovetail.hooks.foreign_source import SamplesAccess, UserSource
from dovetail.hooks.invoke import Invoke
from dovetail.hooks.spec import HookSpec, Kind
from dovetail.types import (
    DataSourceCall,
    DynamicFilterOutput,
    EvalOutput,
    GenerateCall,
    GenerateFnInput,
    Group,
    HookRunError,
    RolloutCall,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnTrainInput,
    RolloutOutput,
    Sample,
)
from dovetail.types.calls import MAKING_SOURCE, RUNNING_ROLLOUT

Adapter = Callable[[HookSpec, Invoke], Callable[..., Any]]


def adapt(spec: HookSpec, invoke: Invoke) -> Callable[..., Any]:
    """A callable in the native form of the slot of `spec`."""
    if spec.kind is Kind.OBJECT:
        return lambda: returns.tool_specs(spec, invoke.target)
    return {**_ROLLOUT, **TRAINING}.get(spec.slot, _plain)(spec, invoke)


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
    given: RolloutFnTrainInput | RolloutFnEvalInput
    if call.evaluation:
        given = RolloutFnEvalInput(call.rollout_id, weight_version=call.weight_version)
    else:
        given = RolloutFnTrainInput(call.rollout_id, weight_version=call.weight_version)
    RUNNING_ROLLOUT.set(call)
    return {
        "call": dataclasses.replace(call, args=invoke.args),
        "rollout_id": call.rollout_id,
        "data_source": call.data_source,
        "evaluation": call.evaluation,
        "input": given,
        "constructor_input": RolloutFnConstructorInput(invoke.args, call.data_source),
    }


def _generate(
    spec: HookSpec, invoke: Invoke
) -> Callable[[GenerateCall], Awaitable[Sample | list[Sample]]]:
    async def generate(call: GenerateCall) -> Sample | list[Sample]:
        call = dataclasses.replace(call, args=invoke.args)
        params = call.sampling_params
        made = await invoke.in_thread(
            call=call,
            input=GenerateFnInput(call.state, call.sample, params, call.evaluation),
            sample=call.sample,
            sampling_params=params,
            evaluation=call.evaluation,
        )
        made = getattr(made, "samples", made)
        samples = list(made) if isinstance(made, list | tuple) else [made]
        if not samples or not all(isinstance(sample, Sample) for sample in samples):
            raise returns.wrong(spec, made)
        return samples if isinstance(made, list | tuple) else samples[0]

    return generate


def _agent(spec: HookSpec, invoke: Invoke) -> Callable[..., Awaitable[Any]]:
    async def run(
        base_url: str, prompt: Any, request_kwargs: dict[str, Any], metadata: dict[str, Any]
    ) -> Any:
        return await invoke.in_thread(
            base_url=base_url, prompt=prompt, request_kwargs=request_kwargs, metadata=metadata
        )

    return run


def _sample_hook(spec: HookSpec, invoke: Invoke) -> Callable[..., Awaitable[Sample]]:
    async def look(sample: Sample, rollout_id: int = 0, evaluation: bool = False) -> Sample:
        got = await invoke.awaited(sample=sample, rollout_id=rollout_id, evaluation=evaluation)
        if got is not None and not isinstance(got, Sample):
            raise returns.wrong(spec, got)
        return sample if got is None else got

    return look


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


def _sample_filter(spec: HookSpec, invoke: Invoke) -> Callable[[list[Group]], Awaitable[None]]:
    async def mark(groups: list[Group]) -> None:
        flat = [sample for group in groups for sample in group]
        await invoke.awaited(groups=groups, samples=flat)

    return mark


def _all_samples(spec: HookSpec, invoke: Invoke) -> Callable[[list[Group], Any], Awaitable[None]]:
    async def process(groups: list[Group], data_source: Any) -> None:
        access = SamplesAccess(data_source)
        await invoke.awaited(
            groups=groups, all_samples=groups, data_source=access, get_samples=access
        )

    return process


def _log(spec: HookSpec, invoke: Invoke) -> Callable[..., bool]:
    def log(
        rollout_id: int, samples: list[Sample], metrics: dict[str, float], time_s: float
    ) -> bool:
        got = invoke.finished(
            rollout_id=rollout_id,
            samples=samples,
            metrics=metrics,
            rollout_extra_metrics=metrics,
            time_s=time_s,
            rollout_time=time_s,
        )
        return bool(got)

    return log


def _eval_log(spec: HookSpec, invoke: Invoke) -> Callable[..., bool]:
    def log(rollout_id: int, data: dict[str, Any], metrics: dict[str, float]) -> bool:
        got = invoke.finished(
            rollout_id=rollout_id, data=data, metrics=metrics, extra_metrics=metrics
        )
        return bool(got)

    return log


def _data_source(spec: HookSpec, invoke: Invoke) -> Callable[[DataSourceCall], UserSource]:
    def make(call: DataSourceCall) -> UserSource:
        token = MAKING_SOURCE.set(call)
        try:
            made = invoke.finished(call=dataclasses.replace(call, args=invoke.args))
        finally:
            MAKING_SOURCE.reset(token)
        pairs = (("state_dict", "load_state_dict"), ("save", "load"))
        ways = [all(callable(getattr(made, name, None)) for name in pair) for pair in pairs]
        served = all(callable(getattr(made, name, None)) for name in ("get_samples", "add_samples"))
        if not served or not any(ways):
            raise returns.wrong(spec, made)
        return UserSource(spec, invoke, made)

    return make


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


def _middleware(spec: HookSpec, invoke: Invoke) -> Callable[..., Any]:
    if not invoke.match.form.makes:

        async def handle(request: Any, call_next: Any) -> Any:
            return await invoke.awaited(request=request, call_next=call_next)

        return handle

    def make(app: Any, router: Any) -> Any:
        return invoke.finished(app=app, router=router)

    return make


def _plain(spec: HookSpec, invoke: Invoke) -> Callable[..., Any]:
    """Called with the values of its form, `args` excepted, by position or name."""
    form = invoke.match.form
    names = [name for name in (*form.positional, *form.named) if name != "args"]

    def values_of(given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        values = {**dict.fromkeys(form.keywords), **dict(zip(names, given, strict=False)), **named}
        missing = [name for name in names if name not in values]
        if missing:
            raise HookRunError(f"{spec.where}: called without {', '.join(missing)}")
        return values

    async def awaited(*given: Any, **named: Any) -> Any:
        return await invoke.awaited(**values_of(given, named))

    def finished(*given: Any, **named: Any) -> Any:
        return invoke.finished(**values_of(given, named))

    return awaited if spec.runs_async else finished


_ROLLOUT: dict[str, Adapter] = {
    "data_source": _data_source,
    "buffer_filter": _buffer_filter,
    "rollout_function": _rollout,
    "eval_function": _evaluation,
    "custom_generate_function": _generate,
    "custom_agent_function": _agent,
    "rollout_sample_hook": _sample_hook,
    "custom_rm": _rewards,
    "dynamic_sampling_filter": _group_filter,
    "rollout_sample_filter": _sample_filter,
    "rollout_all_samples_process": _all_samples,
    "custom_rollout_log_function": _log,
    "custom_eval_rollout_log_function": _eval_log,
    "router_middleware": _middleware,
}
