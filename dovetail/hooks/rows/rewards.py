"""Hooks of rewards."""

from __future__ import annotations

from dovetail.hooks.rows.families import FOREIGN
from dovetail.hooks.spec import CallForm, HookSpec, OnError

REWARDS: tuple[HookSpec, ...] = (
    HookSpec(
        slot="custom_rm",
        stage="rewards",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("sample",)),
            CallForm(families=FOREIGN, positional=("args", "sample")),
            CallForm(families=("native",), positional=("samples",), batched=True),
            CallForm(families=FOREIGN, positional=("args", "samples"), batched=True),
        ),
        default="the built-in reward named by --rm-type",
        returns="a number, or a dict with the entry reward_key; for a group a list of them",
        when="when a sample (with --group-rm: a group) is finished and has no reward yet",
        on_error=OnError.COUNT,
        doc=(
            "Whether a function takes a sample or a group is read off its parameter: its "
            "annotation, else its name (`sample`; `samples`, `group`), else --group-rm decides. "
            "A function for one sample under --group-rm is called for each. A list of another "
            "length than the group's ends the run. A call is ended after reward_timeout_s; a plain "
            "function runs on the rollout's own loop, so it must be quick."
        ),
        example=(
            "def reward(sample):\n    return 1.0 if str(sample.label) in sample.response else 0.0\n"
        ),
        example_name="reward",
        time_limit="reward_timeout_s",
    ),
    HookSpec(
        slot="custom_reward_post_process",
        stage="batch",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("samples",)),
            CallForm(families=FOREIGN, positional=("args", "samples")),
        ),
        default="rewards centred on their group, and divided by its standard deviation",
        returns="two lists, one entry per sample: raw rewards (logged), rewards (trained on)",
        when="once per step, on all samples of the step in order",
        doc=(
            "Replaces group normalisation. Groups are known by `sample.group_index`. The first "
            "list is only logged."
        ),
        example=(
            "def post_process(samples):\n"
            "    raw = [float(sample.reward) for sample in samples]\n"
            "    centre = sum(raw) / len(raw)\n"
            "    return raw, [value - centre for value in raw]\n"
        ),
        example_name="post_process",
        runs_async=False,
    ),
)
