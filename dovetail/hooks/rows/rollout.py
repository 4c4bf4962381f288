"""Hooks of the rollout: the whole of it, one sample of it, and what sees its groups."""

from __future__ import annotations

from dovetail.hooks.rows.families import ALL, CALLED, DOCUMENTED, FOREIGN
from dovetail.hooks.spec import CallForm, HookSpec, OnError

_STEP_FORMS = (
    CallForm(families=("native",), positional=("call",)),
    CallForm(
        families=FOREIGN,
        positional=("args", "rollout_id", "data_source"),
        keywords=("evaluation",),
        to_var_keywords=True,
        origin=CALLED,
    ),
    CallForm(
        families=("slime", "miles"),
        positional=("args", "rollout_id"),
        keywords=("evaluation",),
        to_var_keywords=True,
        origin=DOCUMENTED,
    ),
    CallForm(
        families=("miles",),
        positional=("input",),
        construct=("constructor_input",),
        origin="class",
    ),
)
_SAMPLE_KEYWORDS = ("rollout_id", "evaluation")


ROLLOUT: tuple[HookSpec, ...] = (
    HookSpec(
        slot="rollout_function",
        stage="rollout",
        process="rollout",
        forms=_STEP_FORMS,
        default="dovetail.rollout.rollout.Rollout",
        returns=(
            "a RolloutOutput, anything with .samples, or a list: groups (lists of samples), or "
            "samples that have their group_index"
        ),
        when="once per step, before training",
        doc=(
            "Replaces the whole way from prompts to scored groups. `call` (a `RolloutCall`) has "
            "the parts that the default one uses: data_source, engine, tokenizer, scorer, args, "
            "and `default`, the built-in rollout itself. A plain (not async) function runs in a "
            "thread of its own. A class is constructed once; miles' kind gets a "
            "RolloutFnConstructorInput there and a RolloutFnTrainInput per call."
        ),
        example=(
            "async def rollout(call):\n"
            "    output = await call.default(call.rollout_id)\n"
            "    longest = max(s.response_length for group in output.samples for s in group)\n"
            '    output.metrics["rollout/longest"] = longest\n'
            "    return output\n"
        ),
        example_name="rollout",
        time_limit=None,
    ),
    HookSpec(
        slot="eval_function",
        stage="rollout",
        process="rollout",
        forms=_STEP_FORMS,
        default="dovetail.rollout.evaluate.Evaluation, or the rollout function if that is foreign",
        returns=(
            "an EvalOutput, anything with .data, or a dict: by set name a list of samples, or "
            '{"rewards": [...], "truncated": [...], "samples": [...]}'
        ),
        when="before the first step and every eval_interval steps",
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
        time_limit=None,
    ),
    HookSpec(
        slot="custom_generate_function",
        stage="rollout",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("call",)),
            CallForm(
                families=FOREIGN,
                positional=("args", "sample", "sampling_params"),
                keywords=("evaluation",),
            ),
            CallForm(
                families=("miles",),
                positional=("input",),
                told_by=("input", "GenerateFnInput"),
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
            "in a thread of its own."
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
        registered={
            "multi_turn": "dovetail.rollout.multi_turn:generate",
            "agent": "dovetail.rollout.session:generate",
        },
        time_limit="generate_timeout_s",
    ),
    HookSpec(
        slot="rollout_sample_hook",
        stage="rollout",
        process="rollout",
        forms=(
            CallForm(
                families=("native",),
                positional=("sample",),
                keywords=_SAMPLE_KEYWORDS,
                to_var_keywords=True,
            ),
            CallForm(
                families=FOREIGN,
                positional=("args", "sample"),
                keywords=_SAMPLE_KEYWORDS,
                to_var_keywords=True,
            ),
        ),
        default="samples stay as they are",
        returns="the Sample, another Sample in its place, or None to keep it",
        when="for every generated sample before its reward, in training and evaluation",
        doc=(
            "Looks at or changes one sample. Aborted ones are handed over too. Several hooks run "
            "in the given order, each with what the one before it made; the flag may be repeated."
        ),
        example=(
            "def mark_long(sample, *, rollout_id, evaluation):\n"
            '    sample.metadata["long"] = sample.response_length > 512\n'
        ),
        example_name="mark_long",
        repeatable=True,
    ),
    HookSpec(
        slot="dynamic_sampling_filter",
        stage="rollout",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("group",)),
            CallForm(families=FOREIGN, positional=("args", "group")),
        ),
        default="every group is kept",
        returns="a DynamicFilterOutput(keep, reason, keep_when_insufficient), or true or false",
        when="for every scored group until the step is full",
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
        slot="rollout_sample_filter",
        stage="rollout",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("groups",)),
            CallForm(families=FOREIGN, positional=("args", "groups"), origin=CALLED),
            CallForm(
                families=ALL,
                positional=("samples",),
                told_by=("samples", "list[Sample]", "Sequence[Sample]"),
                origin="flat",
            ),
            CallForm(
                families=FOREIGN,
                positional=("args", "samples"),
                told_by=("samples", "list[Sample]", "Sequence[Sample]"),
                origin=f"flat, {DOCUMENTED}",
            ),
        ),
        default="every sample of the step is trained on",
        returns="nothing; it sets sample.remove_sample",
        when="once per step, on its groups, when the step is full",
        doc=(
            "Takes samples out of the loss: set `sample.remove_sample = True`. They still count in "
            "the batch and in the rewards of their group. A parameter named `samples`, or "
            "annotated list[Sample], gets one flat list; any other gets the list of groups."
        ),
        example=(
            "def drop_truncated(groups):\n"
            "    for group in groups:\n"
            "        for sample in group:\n"
            '            sample.remove_sample = sample.status.value == "truncated"\n'
        ),
        example_name="drop_truncated",
    ),
    HookSpec(
        slot="rollout_all_samples_process",
        stage="rollout",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("groups", "data_source")),
            CallForm(
                families=FOREIGN,
                positional=("args", "all_samples", "get_samples"),
                origin=CALLED,
            ),
            CallForm(
                families=("vime",),
                positional=("args", "all_samples", "data_source"),
                origin=DOCUMENTED,
            ),
            CallForm(
                families=("slime", "miles"),
                positional=("args", "all_samples"),
                origin=DOCUMENTED,
            ),
        ),
        default="nothing",
        returns="nothing; it works by side effect",
        when="once per step, with every finished group, also those that a filter dropped",
        doc=(
            "Sees all that was generated, e.g. to put groups back or to keep statistics. The data "
            "source that it is handed is also callable as get_samples(n)."
        ),
        example=(
            "def retry_failures(groups, data_source):\n"
            "    for group in groups:\n"
            "        if all(sample.reward == 0 for sample in group):\n"
            "            for sample in group:\n"
            "                sample.reset_for_retry()\n"
            "            data_source.add_samples([group])\n"
        ),
        example_name="retry_failures",
    ),
    HookSpec(
        slot="custom_rollout_log_function",
        stage="rollout",
        process="rollout",
        forms=(
            CallForm(
                families=("native",), positional=("rollout_id", "samples", "metrics", "time_s")
            ),
            CallForm(
                families=FOREIGN,
                positional=(
                    "rollout_id",
                    "args",
                    "samples",
                    "rollout_extra_metrics",
                    "rollout_time",
                ),
            ),
        ),
        default="the built-in metrics of the rollout",
        returns="true to leave the built-in metrics out, false or None to keep them",
        when="once per step, on its samples, before they are converted",
        doc=(
            "`metrics` may be edited in place: what is in it is logged. `samples` is flat; "
            "`time_s` is how long the rollout took."
        ),
        example=(
            "def log_lengths(rollout_id, samples, metrics, time_s):\n"
            "    lengths = sorted(sample.response_length for sample in samples)\n"
            '    metrics["rollout/median_length"] = lengths[len(lengths) // 2]\n'
        ),
        example_name="log_lengths",
        runs_async=False,
    ),
    HookSpec(
        slot="custom_eval_rollout_log_function",
        stage="rollout",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("rollout_id", "data", "metrics")),
            CallForm(families=FOREIGN, positional=("rollout_id", "args", "data", "extra_metrics")),
        ),
        default="the built-in metrics of evaluation",
        returns="true to leave the built-in metrics out, false or None to keep them",
        when="after each evaluation",
        doc=(
            '`data` is by set name {"rewards": [...], "truncated": [...], "samples": [...]}. '
            "`metrics` may be edited in place: what is in it is logged."
        ),
        example=(
            "def log_best(rollout_id, data, metrics):\n"
            "    for name, columns in data.items():\n"
            '        metrics[f"eval/{name}/best"] = max(columns["rewards"])\n'
        ),
        example_name="log_best",
        runs_async=False,
    ),
)
