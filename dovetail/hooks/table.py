"""The table of hooks: one row per function that a user may put into the loop."""

from __future__ import annotations

from difflib import get_close_matches

from dovetail.hooks.spec import CallForm, HookSpec, OnError
from dovetail.types import HookError

_FAMILY = ("slime", "vime", "miles")
_DOCUMENTED = "as their guides show it"
_CALLED = "as it is called"

_ROLLOUT_FORMS = (
    CallForm(families=("native",), positional=("call",)),
    CallForm(
        families=_FAMILY,
        positional=("args", "rollout_id", "data_source"),
        keywords=("evaluation",),
        to_var_keywords=True,
        origin=_CALLED,
    ),
    CallForm(
        families=("slime", "miles"),
        positional=("args", "rollout_id"),
        keywords=("evaluation",),
        to_var_keywords=True,
        origin=_DOCUMENTED,
    ),
    CallForm(families=("miles",), positional=("call",), construct=("call",), origin="class"),
)


HOOKS: tuple[HookSpec, ...] = (
    HookSpec(
        slot="rollout_function",
        summary="Collects all samples of a step.",
        stage="rollout",
        process="rollout",
        forms=_ROLLOUT_FORMS,
        default="dovetail.rollout.rollout.Rollout",
        returns=(
            "a RolloutOutput, anything with .samples, or a list: groups (lists of samples), or "
            "samples that have their group_index"
        ),
        when="once per step, before training",
        on_error=OnError.STOP,
        doc=(
            "Replaces the whole way from prompts to scored groups. `call` (a `RolloutCall`) has "
            "the parts that the default one uses: data_source, engine, tokenizer, scorer, args, "
            "and `default`, the built-in rollout itself. A plain (not async) function runs in a "
            "thread of its own. A class is constructed once; its constructor gets the first "
            "call."
        ),
        example=(
            "async def rollout(call):\n"
            "    output = await call.default(call.rollout_id)\n"
            "    longest = max(s.response_length for group in output.samples for s in group)\n"
            '    output.metrics["rollout/longest"] = longest\n'
            "    return output\n"
        ),
        example_name="rollout",
    ),
    HookSpec(
        slot="eval_function",
        summary="Evaluates the policy.",
        stage="rollout",
        process="rollout",
        forms=_ROLLOUT_FORMS,
        default="dovetail.rollout.evaluate.Evaluation, or the rollout function if that is foreign",
        returns=(
            "an EvalOutput, anything with .data, or a dict: by set name a list of samples, or "
            '{"rewards": [...], "truncated": [...], "samples": [...]}'
        ),
        when="before the first step and every eval_interval steps",
        on_error=OnError.STOP,
        doc=(
            "Replaces evaluation. It is called like a rollout function with `evaluation` true; "
            "`call.default(rollout_id)` is the built-in evaluation over the configured sets. "
            "Set to the same path as the rollout function, it is the same object."
        ),
        example=(
            "async def evaluate(call):\n"
            "    output = await call.default(call.rollout_id)\n"
            '    output.metrics["eval/sets"] = float(len(output.data))\n'
            "    return output\n"
        ),
        example_name="evaluate",
    ),
    HookSpec(
        slot="custom_generate_function",
        summary="Makes the response of one sample.",
        stage="rollout",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("call",)),
            CallForm(
                families=_FAMILY,
                positional=("args", "sample", "sampling_params"),
                keywords=("evaluation",),
            ),
            CallForm(
                families=("miles",),
                positional=("call",),
                origin="GenerateFnInput, class or function",
            ),
        ),
        default="dovetail.rollout.generate.generate",
        returns="a Sample, or a list of Samples when one execution fans out into several",
        when="for every sample that is not finished, in training and evaluation",
        on_error=OnError.DROP,
        doc=(
            "For turns, tools and retrieval. Append what was sampled and what was observed with "
            "`sample.append_response_tokens`, observed tokens with trainable=False. `call` (a "
            "`GenerateCall`) has sample, sampling, engine, tokenizer, args, `aborted`, and "
            "`default`, the built-in function. Poll `aborted` between turns and end with status "
            "ABORTED: under partial rollout the sample is resumed later. A plain function runs "
            "in a thread."
        ),
        example=(
            "async def generate(call):\n"
            "    sample = await call.default(call.sample, call.sampling)\n"
            '    note = " (checked)"\n'
            "    ids = call.tokenizer.encode(note, add_special_tokens=False)\n"
            "    sample.append_response_tokens(tokens=ids, trainable=False, text=note)\n"
            "    return sample\n"
        ),
        example_name="generate",
    ),
    HookSpec(
        slot="custom_rm",
        summary="The reward of a sample, or of a whole group with --group-rm.",
        stage="rewards",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("sample",)),
            CallForm(families=_FAMILY, positional=("args", "sample")),
            CallForm(families=("native",), positional=("samples",), batched=True),
            CallForm(families=_FAMILY, positional=("args", "samples"), batched=True),
        ),
        default="the built-in reward named by --rm-type",
        returns="a number, or a dict with the entry reward_key; for a group a list of them",
        when="when a sample (with --group-rm: a group) is finished and has no reward yet",
        on_error=OnError.COUNT,
        doc=(
            "Whether a function takes a sample or a group is read off its parameter: its "
            "annotation, else its name (`sample`; `samples`, `group`), else --group-rm decides. "
            "A function for one sample under --group-rm is called for each. An async function "
            "is ended after reward_timeout_s; a plain one runs on the rollout's own loop, so it "
            "must be quick."
        ),
        example=(
            "def reward(sample):\n    return 1.0 if str(sample.label) in sample.response else 0.0\n"
        ),
        example_name="reward",
    ),
    HookSpec(
        slot="dynamic_sampling_filter",
        summary="Keeps or drops a finished group.",
        stage="rollout",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("group",)),
            CallForm(families=_FAMILY, positional=("args", "group")),
        ),
        default="every group is kept",
        returns="a DynamicFilterOutput(keep, reason, keep_when_insufficient), or true or false",
        when="for every scored group until the step is full",
        on_error=OnError.STOP,
        doc=(
            "Dropped groups are replaced by further prompts and counted as "
            "`rollout/dynamic_filter/drop_<reason>`. A group refused with "
            "keep_when_insufficient is kept when dropping it would cost another round of "
            "sampling. A step that drops max_dropped_groups in a row ends the run."
        ),
        example=("def keep(group):\n    return len({sample.reward for sample in group}) > 1\n"),
        example_name="keep",
        registered={
            name: f"dovetail.rollout.filters:{name}"
            for name in (
                "check_reward_nonzero_std",
                "check_reward_nonzero_std_with_fallback",
                "check_no_aborted",
            )
        },
    ),
    HookSpec(
        slot="buffer_filter",
        summary="Chooses groups out of the buffer.",
        stage="data",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("buffer", "num_samples")),
            CallForm(
                families=_FAMILY,
                positional=("args", "rollout_id", "buffer", "num_samples"),
                origin=_CALLED,
            ),
            CallForm(families=("slime", "miles"), positional=("samples",), origin=_DOCUMENTED),
            CallForm(
                families=("slime", "miles"), positional=("args", "samples"), origin=_DOCUMENTED
            ),
        ),
        default="the oldest groups",
        returns="a list of at most num_samples groups",
        when="when prompts are needed and groups wait in the buffer (partial rollout)",
        on_error=OnError.STOP,
        doc=(
            "Takes groups out of `buffer` (in place) and returns them; new prompts make up what "
            "is missing. The documented forms get no count: what they return replaces the "
            "buffer, and its first groups are served; what they leave out is gone. rollout_id "
            "is always None."
        ),
        example=(
            "def longest_first(buffer, num_samples):\n"
            "    buffer.sort(key=lambda group: -sum(s.response_length for s in group))\n"
            "    taken = buffer[:num_samples]\n"
            "    del buffer[:num_samples]\n"
            "    return taken\n"
        ),
        example_name="longest_first",
        runs_async=False,
        registered={"pop_first": "dovetail.data.source:pop_first"},
    ),
    HookSpec(
        slot="custom_reward_post_process",
        summary="Turns rewards into what advantages start from.",
        stage="batch",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("samples",)),
            CallForm(families=_FAMILY, positional=("args", "samples")),
        ),
        default="rewards centred on their group, and divided by its standard deviation",
        returns="two lists, one entry per sample: raw rewards (logged), rewards (trained on)",
        when="once per step, on all samples of the step in order",
        on_error=OnError.STOP,
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


def spec_of(slot: str) -> HookSpec:
    """The row of a slot.

    Raises:
        HookError: there is none; the message has the nearest.
    """
    rows = {spec.slot: spec for spec in HOOKS}
    if slot in rows:
        return rows[slot]
    near = get_close_matches(slot, rows, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise HookError(f"there is no hook {slot!r}{hint}. There are: {', '.join(rows)}")
