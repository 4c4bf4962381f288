"""What a user's function gave back, as our records. What can't be read raises with what was got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import isawaitable
from typing import Any

from dovetail.hooks.spec import HookSpec
from dovetail.types import (
    DynamicFilterOutput,
    EvalOutput,
    Group,
    HookRunError,
    RolloutOutput,
    Sample,
)


def wrong(spec: HookSpec, got: Any) -> HookRunError:
    """The error for a return value that does not keep the row's contract."""
    return HookRunError(
        f"{spec.where}: the function gave back a {_shown(got)}. Expected: {spec.returns}"
    )


def _shown(got: Any) -> str:
    text = repr(got)
    cut = text if len(text) <= 120 else text[:117] + "..."
    await_it = " (an await is missing)" if isawaitable(got) else ""
    return f"{type(got).__name__}: {cut}{await_it}"


def rollout_output(spec: HookSpec, got: Any) -> RolloutOutput:
    """Groups of samples: a RolloutOutput, anything with `.samples`, or lists, flat or nested."""
    samples = getattr(got, "samples", got)
    metrics = dict(getattr(got, "metrics", None) or {})
    if not isinstance(samples, list | tuple):
        raise wrong(spec, got)
    if not samples:
        raise HookRunError(f"{spec.where}: the function gave back no samples: the list is empty")
    if all(isinstance(one, Sample) for one in samples):
        return RolloutOutput(_grouped(spec, samples), metrics)
    groups = [list(_flat(spec, one)) for one in samples]
    for position, group in enumerate(groups):
        for sample in group:
            if sample.group_index is None:
                sample.group_index = position
    return RolloutOutput(groups, metrics)


def _grouped(spec: HookSpec, samples: Sequence[Sample]) -> list[Group]:
    groups: dict[int, Group] = {}
    for sample in samples:
        if sample.group_index is None:
            raise HookRunError(
                f"{spec.where}: the function gave back a flat list, and sample {sample.index} has "
                "no group_index; set it, or give back a list of groups"
            )
        groups.setdefault(sample.group_index, []).append(sample)
    return list(groups.values())


def _flat(spec: HookSpec, got: Any) -> list[Sample]:
    """One group, in which an execution may have fanned out into a list of its own."""
    if isinstance(got, Sample):
        return [got]
    if not isinstance(got, list | tuple):
        raise HookRunError(
            f"{spec.where}: the function gave back, where a Sample is expected, a {_shown(got)}"
        )
    if not got:
        raise HookRunError(f"{spec.where}: the function gave back a group without samples")
    return [sample for one in got for sample in _flat(spec, one)]


def eval_output(spec: HookSpec, got: Any) -> EvalOutput:
    """Samples by set: an EvalOutput, anything with `.data`, or `{name: samples or columns}`.

    Columns are `{"rewards": [...], "truncated": [...], "samples": [...]}`; what is in them and not
    in the metrics is added there as `eval/<name>/reward` and `eval/<name>/truncated`.
    """
    data = getattr(got, "data", got)
    if not isinstance(data, Mapping):
        raise wrong(spec, got)
    metrics = dict(getattr(got, "metrics", None) or {})
    by_set: dict[str, list[Sample]] = {}
    shown: dict[str, dict[str, list[Any]]] = {}
    for name, found in data.items():
        columns = found if isinstance(found, Mapping) else {"samples": found}
        shown[str(name)] = {key: values for key, values in columns.items() if values is not None}
        by_set[str(name)] = list(columns.get("samples") or [])
        for column, metric in (("rewards", "reward"), ("truncated", "truncated")):
            values = columns.get(column)
            if values:
                mean = sum(map(float, values)) / len(values)
                metrics.setdefault(f"eval/{name}/{metric}", mean)
    return EvalOutput(by_set, metrics, shown)


def filter_output(spec: HookSpec, got: Any) -> DynamicFilterOutput:
    """A verdict: our record, another framework's of the same fields, or anything true or false."""
    if got is None:
        raise wrong(spec, got)
    if not hasattr(got, "keep"):
        return DynamicFilterOutput(keep=bool(got))
    return DynamicFilterOutput(
        keep=bool(got.keep),
        reason=getattr(got, "reason", None),
        keep_when_insufficient=bool(getattr(got, "keep_when_insufficient", False)),
    )


def reward_list(spec: HookSpec, got: Any, num_samples: int) -> list[Any]:
    """One reward per sample of a group."""
    rewards = listed(got)
    if rewards is None:
        raise wrong(spec, got)
    if len(rewards) != num_samples:
        raise HookRunError(
            f"{spec.where}: the function gave back {len(rewards)} rewards for a group of "
            f"{num_samples} samples"
        )
    return rewards


def reward_pair(spec: HookSpec, got: Any, num_samples: int) -> tuple[list[float], list[float]]:
    """(raw rewards, rewards that advantages start from), one of each per sample."""
    if not isinstance(got, list | tuple) or len(got) != 2:
        raise wrong(spec, got)
    raw, rewards = listed(got[0]), listed(got[1])
    if raw is None or rewards is None:
        raise wrong(spec, got)
    if not len(raw) == len(rewards) == num_samples:
        raise HookRunError(
            f"{spec.where}: the function gave back {len(raw)} raw rewards and {len(rewards)} "
            f"rewards for {num_samples} samples"
        )
    return [float(value) for value in raw], [float(value) for value in rewards]


def listed(got: Any) -> list[Any] | None:
    """A list, also of a tensor or an array; None for what has no such form."""
    if hasattr(got, "tolist"):
        got = got.tolist()
    return list(got) if isinstance(got, list | tuple) else None


def tool_specs(spec: HookSpec, got: Any) -> list[dict[str, Any]]:
    """A list of dicts."""
    if not isinstance(got, list | tuple) or not all(isinstance(one, Mapping) for one in got):
        raise wrong(spec, got)
    return [dict(one) for one in got]
