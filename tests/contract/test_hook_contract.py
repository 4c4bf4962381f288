"""Every row of the hook table x call form x kind of callable: found, called, answered."""

import asyncio
import inspect
import itertools
import re
import textwrap

import pytest

from dovetail.config.run import RunConfig
from dovetail.config.sections import HooksConfig
from dovetail.hooks import HOOKS, ArgsView, bind, spec_of
from dovetail.types import (
    DynamicFilterOutput,
    EvalOutput,
    GenerateCall,
    HookError,
    RolloutCall,
    RolloutOutput,
    Sample,
    SamplingParams,
)

STYLES = ("def", "async def", "class", "class with args", "object", "partial")


def siblings(group_index=0):
    return [
        Sample(
            group_index=group_index, index=2 * group_index + i, response="2", label="2", reward=i
        )
        for i in range(2)
    ]


async def answered(sample, sampling):
    sample.append_response_tokens(tokens=[1], log_probs=[-0.1], text="ok")
    sample.status = Sample.Status.COMPLETED
    return sample


class Letters:
    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in text]


def rollout_call():
    async def default(rollout_id):
        return RolloutOutput([siblings()])

    return RolloutCall(rollout_id=4, data_source="source", default=default)


def eval_call():
    async def default(rollout_id):
        return EvalOutput({"set": siblings()})

    return RolloutCall(rollout_id=4, data_source="source", default=default)


def generate_call():
    return GenerateCall(
        sample=siblings()[0],
        sampling=SamplingParams(seed=9),
        engine=None,
        tokenizer=Letters(),
        default=answered,
        evaluation=True,
    )


GIVEN = {
    "rollout_function": lambda: (rollout_call(),),
    "eval_function": lambda: (eval_call(),),
    "custom_generate_function": lambda: (generate_call(),),
    "custom_rm": lambda: (siblings()[1],),
    "custom_rm batched": lambda: (siblings(),),
    "dynamic_sampling_filter": lambda: (siblings(),),
    "buffer_filter": lambda: ([siblings(0), siblings(1)], 1),
    "custom_reward_post_process": lambda: (siblings(),),
}
"""What the owner of each slot calls it with."""

ANSWERS = {
    "rollout_function": "[[Sample(index=0), Sample(index=1)]]",
    "eval_function": "{'set': {'rewards': [1.0, 0.0], 'truncated': [False, False]}}",
    "custom_generate_function": "Sample(index=0)",
    "custom_rm": "0.5",
    "custom_rm batched": "[0.5, 0.25]",
    "dynamic_sampling_filter": "1",
    "buffer_filter": "[BUFFER.pop(0)]",
    "custom_reward_post_process": "([0.0, 1.0], [-1.0, 1.0])",
}
"""What the written functions give back."""


def check(slot, result):
    if slot == "rollout_function":
        assert isinstance(result, RolloutOutput)
        assert [[s.index for s in group] for group in result.samples] == [[0, 1]]
    elif slot == "eval_function":
        assert isinstance(result, EvalOutput) and list(result.data) == ["set"]
        assert result.metrics["eval/set/reward"] == 0.5
    elif slot == "custom_generate_function":
        assert isinstance(result, Sample)
    elif slot == "custom_rm":
        assert result == 0.5
    elif slot == "custom_rm batched":
        assert result == [0.5, 0.25]
    elif slot == "dynamic_sampling_filter":
        assert isinstance(result, DynamicFilterOutput) and result.keep
    elif slot == "buffer_filter":
        assert [group[0].group_index for group in result] == [0]
    else:
        assert result == ([0.0, 1.0], [-1.0, 1.0])


def source_of(form, slot, style):
    """A user's file in which `hook`, a callable of this form and kind, notes what it got."""
    names = [*form.positional, *(f"{name}=None" for name in form.keywords)]
    noted = ", ".join(f"{name}={name}" for name in (*form.positional, *form.keywords))
    buffer = "samples" if "samples" in form.positional else "buffer"
    answer = ANSWERS[slot].replace("BUFFER", buffer)
    body = f"SEEN.append(dict({noted}))\n    return {answer}\n"
    head = "from functools import partial\nfrom dovetail.types import Sample\nSEEN = []\n"
    if style in ("def", "async def") and form.construct is None:
        return head + f"{style} hook({', '.join(names)}):\n    {body}"
    if style == "partial":
        return head + f"def make(fixed, {', '.join(names)}):\n    {body}hook = partial(make, 7)\n"
    method = f"def __call__(self, {', '.join(names)}):\n    {body}"
    init = ""
    if style == "class with args":
        init = "def __init__(self, args):\n    SEEN.append(args.lr)\n"
    if form.construct is not None:
        init = f"def __init__(self, {form.construct[0]}):\n    self.given = {form.construct[0]}\n"
    made = "hook = Hook()\n" if style == "object" and form.construct is None else "hook = Hook\n"
    return head + "class Hook:\n" + textwrap.indent(init + method, "    ") + made


def cases():
    for spec in HOOKS:
        for form, style in itertools.product(spec.forms, STYLES):
            if form.construct is None or style == "class":
                slot = f"{spec.slot} batched" if form.batched else spec.slot
                yield pytest.param(spec, form, slot, style, id=f"{slot}-{form.label}-{style}")


def finished(result):
    return asyncio.run(result) if inspect.isawaitable(result) else result


@pytest.mark.parametrize(("spec", "form", "slot", "style"), list(cases()))
def test_every_form_is_found_called_and_answered(spec, form, slot, style, tmp_path):
    file = tmp_path / "user_hook.py"
    file.write_text(source_of(form, slot, style))
    config = RunConfig.model_validate({"reward": {"group_rm": form.batched}})
    hook = bind(spec.slot, f"{form.families[0]}:{file}:hook", ArgsView(config))
    assert hook.form.positional == form.positional
    result = finished(hook(*GIVEN[slot]()))
    check(slot, result)
    seen = hook.invoke.target
    seen = getattr(seen, "func", seen)
    noted = inspect.getmodule(seen if hasattr(seen, "__module__") else type(seen)).SEEN
    got = noted[-1]
    if "args" in got:
        assert got["args"].rollout_batch_size == 8
    if "sampling_params" in got:
        assert got["sampling_params"]["sampling_seed"] == 9
    if "evaluation" in got:
        assert got["evaluation"] is (spec.slot != "rollout_function")
    if "data_source" in got:
        assert (got["rollout_id"], got["data_source"]) == (4, "source")
    if "call" in got:
        assert got["call"].args.rollout_batch_size == 8
    if style == "class with args":
        assert noted[0] == 1e-6


@pytest.mark.parametrize("spec", HOOKS, ids=lambda spec: spec.slot)
def test_every_example_runs_as_it_is_printed(spec, tmp_path):
    file = tmp_path / "example.py"
    file.write_text(spec.example)
    hook = bind(spec.slot, f"{file}:{spec.example_name}", ArgsView(RunConfig()))
    assert "native" in hook.form.families
    result = finished(hook(*GIVEN[spec.slot]()))
    expected = {
        "custom_generate_function": Sample,
        "rollout_function": RolloutOutput,
        "eval_function": EvalOutput,
        "custom_rm": float,
        "dynamic_sampling_filter": DynamicFilterOutput,
        "buffer_filter": list,
        "custom_reward_post_process": tuple,
    }
    assert isinstance(result, expected[spec.slot])


@pytest.mark.parametrize("spec", HOOKS, ids=lambda spec: spec.slot)
def test_every_row_is_complete_and_has_its_knob(spec):
    assert spec.leaf in HooksConfig.model_fields
    for text in (spec.summary, spec.returns, spec.when, spec.doc, spec.default, spec.example):
        assert text.strip()
    families = {family for form in spec.forms for family in form.families}
    assert families == {"native", "slime", "vime", "miles"}


def test_every_knob_has_its_row():
    assert {spec.leaf for spec in HOOKS} == set(HooksConfig.model_fields)


@pytest.mark.parametrize("spec", HOOKS, ids=lambda spec: spec.slot)
def test_registered_names_bind(spec):
    for name in spec.registered:
        assert bind(spec.slot, name, ArgsView(RunConfig())).path == name


@pytest.mark.parametrize("spec", HOOKS, ids=lambda spec: spec.slot)
def test_a_misfit_shows_the_signature_the_forms_and_what_differs(spec, tmp_path):
    file = tmp_path / "misfit.py"
    file.write_text("def hook(a, b, c, d, e, f, g):\n    pass\n")
    with pytest.raises(HookError) as caught:
        bind(spec.slot, f"{file}:hook")
    text = str(caught.value)
    assert f"{spec.flag} (TOML: {spec.key})" in text
    assert f"def hook(a, b, c, d, e, f, g) at {file}:1" in text
    for form in spec.forms:
        assert f"{form.label}: {form.signature}" in text
    assert re.search(r"yours requires .*, which (is|are) not passed", text)


@pytest.mark.parametrize("spec", HOOKS, ids=lambda spec: spec.slot)
def test_what_is_not_callable_is_refused(spec, tmp_path):
    file = tmp_path / "thing.py"
    file.write_text("hook = 3\nclass NoCall:\n    pass\n")
    with pytest.raises(HookError, match=r"thing\.py:hook is of type int, not a function"):
        bind(spec.slot, f"{file}:hook")
    with pytest.raises(HookError, match="your class has no __call__"):
        bind(spec_of(spec.slot).slot, f"{file}:NoCall")
