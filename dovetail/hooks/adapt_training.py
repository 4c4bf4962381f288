"""From a matched function to a callable in the native form of its slot: the training side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dovetail.hooks import returns, training_returns
from dovetail.hooks.invoke import Invoke
from dovetail.hooks.spec import HookSpec
from dovetail.types import CorrectionCall, Group, LossCall, ReducerCall, Sample

if TYPE_CHECKING:
    from torch import Tensor


def _reward_post_process(
    spec: HookSpec, invoke: Invoke
) -> Callable[[list[Sample]], tuple[list[float], list[float]]]:
    def post_process(samples: list[Sample]) -> tuple[list[float], list[float]]:
        return returns.reward_pair(spec, invoke.finished(samples=samples), len(samples))

    return post_process


def _convert(spec: HookSpec, invoke: Invoke) -> Callable[[list[Sample]], dict[str, list[Any]]]:
    def convert(samples: list[Sample]) -> dict[str, list[Any]]:
        return training_returns.train_data(spec, invoke.finished(samples=samples))

    return convert


def _data_postprocess(spec: HookSpec, invoke: Invoke) -> Callable[..., None]:
    def postprocess(rollout_id: int, data: dict[str, Any], samples: list[Sample]) -> None:
        named = {"data": data, "rollout_data": data, "flat_samples": samples}
        invoke.finished(rollout_id=rollout_id, samples=_by_group(samples), **named)

    return postprocess


def _by_group(samples: list[Sample]) -> list[Group]:
    """Samples without a group stand alone."""
    groups: dict[int, Group] = {}
    for sample in samples:
        key = id(sample) if sample.group_index is None else sample.group_index
        groups.setdefault(key, []).append(sample)
    return list(groups.values())


def _advantage(spec: HookSpec, invoke: Invoke) -> Callable[[dict[str, Any]], None]:
    def advantages(data: dict[str, Any]) -> None:
        got = invoke.finished(data=data, rollout_data=data)
        training_returns.set_advantages(spec, got, data)

    return advantages


def _loss(spec: HookSpec, invoke: Invoke) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Native functions are called with a LossCall; the family's with (batch, logits, reducer)."""
    if "call" in invoke.match.form.positional:

        def loss(call: LossCall) -> tuple[Tensor, dict[str, Any]]:
            got = invoke.finished(call=dataclasses.replace(call, args=invoke.args))
            return training_returns.loss_pair(spec, got)

        return loss

    def loss_of_logits(
        batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[..., Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        got = invoke.finished(batch=batch, logits=logits, sum_of_sample_mean=sum_of_sample_mean)
        return training_returns.loss_pair(spec, got)

    return loss_of_logits


def _correction(
    spec: HookSpec, invoke: Invoke
) -> Callable[[CorrectionCall], tuple[Tensor, list[Tensor], dict[str, Any]]]:
    names = [field.name for field in dataclasses.fields(CorrectionCall) if field.name != "args"]

    def correct(call: CorrectionCall) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        values = {name: getattr(call, name) for name in names}
        got = invoke.finished(call=dataclasses.replace(call, args=invoke.args), **values)
        return training_returns.correction(spec, got, call)

    return correct


def _reducer(spec: HookSpec, invoke: Invoke) -> Callable[[ReducerCall], Callable[..., Tensor]]:
    def reducer(call: ReducerCall) -> Callable[..., Tensor]:
        got = invoke.finished(
            loss_masks=call.loss_masks,
            per_token=call.per_token,
            total_lengths=call.total_lengths,
            response_lengths=call.response_lengths,
            pg_loss_masks=call.loss_masks,
            calculate_per_token_loss=call.per_token,
        )
        return training_returns.reducer(spec, got)

    return reducer


TRAINING: dict[str, Callable[[HookSpec, Invoke], Callable[..., Any]]] = {
    "custom_reward_post_process": _reward_post_process,
    "custom_convert_samples_to_train_data": _convert,
    "rollout_data_postprocess": _data_postprocess,
    "custom_advantage_function": _advantage,
    "custom_loss_function": _loss,
    "custom_tis_function": _correction,
    "custom_pg_loss_reducer_function": _reducer,
}
