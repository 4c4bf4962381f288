"""What keeps, drops, chooses or marks: filters of groups and samples."""

from __future__ import annotations

import copy
import dis
import types
from collections.abc import Iterator
from typing import Any

from dovetail.config.run import RunConfig
from dovetail.hooks import BoundHook
from dovetail.run.rehearse.samples import Unchanged, check_mask, finish, groups, kinds
from dovetail.run.rehearse.source import FewPrompts
from dovetail.run.rehearse.stage import Stage
from dovetail.run.rehearse.tokenizers import tokenizer_of
from dovetail.run.rehearse.verdict import Fault
from dovetail.types import Group, Sample

_CHANGES = frozenset(
    {"STORE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR", "setattr", "remove", "pop", "clear", "sort"}
)
"""Signs that a function may change what it is given."""


def dynamic_filter(hook: BoundHook, stage: Stage) -> None:
    """Groups with mixed and with equal rewards."""

    def judge(group: Group) -> None:
        before = Unchanged(group)
        got = stage.call(lambda: hook.invoke.awaited(group=group))
        before.check()
        if not hasattr(got, "keep") and not _is_truth(got):
            raise Fault(
                f"returns {_shown(got)} instead of a DynamicFilterOutput, true or false"
                + (": is a return missing?" if got is None else "")
            )

    mixed, stage.made_up = groups(stage.config, stage.missing, 1)
    equal, _ = groups(stage.config, stage.missing, 1, rewards=(1.0, 1.0))
    stage.try_all(judge, {"mixed rewards": mixed[0], "equal rewards": equal[0]})


def _is_truth(got: Any) -> bool:
    """A bool or a number, those of numpy and torch too."""
    if isinstance(got, bool | int | float):
        return True
    return hasattr(got, "item") and getattr(got, "shape", ()) in ((), (1,))


def buffer_filter(hook: BoundHook, stage: Stage) -> None:
    """Three groups wait and two are wanted: unfinished ones, and finished ones."""

    def choose(waiting: list[Group]) -> None:
        buffer, wanted = list(waiting), 2
        taken = stage.call(hook, buffer, wanted)
        if not isinstance(taken, list | tuple):
            raise Fault(f"returns {_shown(taken)} instead of a list of groups")
        if len(taken) > wanted:
            raise Fault(f"returns {len(taken)} groups where at most {wanted} are wanted")
        if not all(any(group is one for one in waiting) for group in taken):
            raise Fault(f"returns {_shown(taken)}: groups that were not in the buffer")
        left = [group for group in taken if any(group is one for one in buffer)]
        if left:
            raise Fault(
                "mutates nothing: the groups that it returns stay in the buffer and would be "
                "served again; take them out in place, e.g. del buffer[:n]"
            )
        if not taken:
            stage.warn(f"takes none of {len(waiting)} waiting groups")

    finished, stage.made_up = groups(stage.config, stage.missing, 3)
    unfinished = copy.deepcopy(finished)
    for sample in (sample for group in unfinished for sample in group):
        sample.status, sample.reward = Sample.Status.ABORTED, None
    stage.try_all(choose, {"unfinished groups": unfinished, "finished groups": finished})


def sample_filter(hook: BoundHook, stage: Stage) -> None:
    """The groups of a step: mixed, all right, all wrong, one cut short, one empty response."""
    changed = []

    def mark(step: list[Group]) -> None:
        samples = [sample for group in step for sample in group]
        before, marks = Unchanged(samples), _marks(step)
        stage.call(hook, step)
        before.check()
        changed.append(_marks(step) != marks)

    step, stage.made_up = groups(stage.config, stage.missing, 4)
    _vary(step, stage.config)
    stage.try_all(mark, {"a step": step})
    if not any(changed):
        _told_unchanged(hook, stage)


def _vary(step: list[Group], config: RunConfig) -> None:
    reward_key = config.reward.reward_key
    for group, reward in ((step[1], 1.0), (step[2], 0.0)):
        for sample in group:
            sample.reward = {reward_key: reward} if reward_key else reward
    long = step[3][0]
    finish(long, tokenizer_of(config), text=" and then" * 200)
    long.status = Sample.Status.TRUNCATED
    step[3][1].response = ""


def _marks(step: list[Group]) -> list[Any]:
    return [
        [
            (s.remove_sample, copy.copy(s.loss_mask), copy.deepcopy(s.reward), s.status)
            for s in group
        ]
        for group in step
    ]


def _told_unchanged(hook: BoundHook, stage: Stage) -> None:
    text = (
        "mutates nothing: its return value is ignored, only what it sets counts, e.g. "
        "sample.remove_sample = True"
    )
    if not set(_changes(hook.invoke.target)) & _CHANGES:
        raise Fault(text)
    stage.warn("changed none of the groups that it was shown")


def _changes(target: Any) -> Iterator[str]:
    """What a function, and those of its module that it names, set or call by name."""
    function = target if hasattr(target, "__code__") else getattr(target, "__call__", None)  # noqa: B004
    seen: set[types.CodeType] = set()
    waiting = [getattr(function, "__func__", function)]
    while waiting:
        function = waiting.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        known = getattr(function, "__globals__", {})
        for inner in _codes(code):
            seen.add(inner)
            for step in dis.get_instructions(inner):
                named = step.opname in ("STORE_ATTR", "DELETE_SUBSCR", "STORE_SUBSCR")
                yield step.opname if named else str(step.argval)
            waiting += [known[name] for name in inner.co_names if name in known]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def all_samples(hook: BoundHook, stage: Stage) -> None:
    """All groups of a step, and a source of further prompts."""

    def process(step: list[Group]) -> None:
        samples = [sample for group in step for sample in group]
        stage.call(hook, step, FewPrompts(stage.config, stage.missing))
        for sample in samples:
            check_mask(sample)

    step, stage.made_up = groups(stage.config, stage.missing, 3)
    stage.try_all(process, {"a step": step})


def sample_hook(hook: BoundHook, stage: Stage) -> None:
    """A right, a wrong and an empty response, in training and in evaluation."""

    def run(sample: Sample) -> None:
        for evaluation in (False, True):
            one = copy.deepcopy(sample)
            got = stage.call(hook, one, 0, evaluation)
            if got is not None and not isinstance(got, Sample):
                raise Fault(f"returns {_shown(got)} instead of a Sample, or None to keep it")
            check_mask(got or one)

    samples, stage.made_up = kinds(stage.config, stage.missing)
    stage.try_all(run, samples)


def _shown(got: Any) -> str:
    return "None" if got is None else f"a {type(got).__name__} ({got!r:.60})"
