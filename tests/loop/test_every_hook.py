"""Every row of the hook table x every call form x {def, async def, class}: inside a real run.

A hook is a file that a user might have written. The run is a real one, two steps with a tiny model;
afterwards what the hook was given and the mark that its work left are looked up in the data, the
metrics or the buffer.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.config.resolve import resolve
from dovetail.hooks import HOOKS, ArgsView, bind, spec_of
from dovetail.hooks.spec import CallForm, HookSpec
from dovetail.rollout import multi_turn
from dovetail.run.train import run_training
from dovetail.types import ConfigError, HookError, Sample
from tests.loop import tiny
from tests.loop.hook_effects import SEEN

STYLES = ("def", "async def", "class")
FLAGS = {
    "data_source": ["--save-interval", "1"],
    "custom_rm": ["--group-rm"],
    "custom_loss_function": ["--loss-type", "custom_loss"],
    "custom_tis_function": ["--use-tis"],
    "buffer_filter": ["--partial-rollout", "--over-sampling-batch-size", "6", "--num-rollout", "3"],
    "dynamic_sampling_filter": ["--over-sampling-batch-size", "2"],
}


def cases() -> list[Any]:
    """(row, form, style) of every hook that this run has an owner for."""
    found = []
    for spec in HOOKS:
        if spec.owner is not None:
            continue
        for form, style in itertools.product(spec.forms, STYLES):
            if form.construct is not None and style == "def":
                continue
            if form.makes and style == "async def":
                continue
            number = spec.forms.index(form)
            found.append(pytest.param(spec, form, style, id=f"{spec.slot}-{number}-{style}"))
    return found


def source_of(spec: HookSpec, form: CallForm, style: str) -> str:
    """A user's file with a function of this form."""
    head = "from tests.loop import hook_effects\nfrom tests.loop.hook_effects import *\n\n"
    if form.makes:
        given = form.positional[0]
        made = f"def hook({given}):\n    return Source({given})\n"
        taking = f"class hook(Source):\n    def __init__(self, {given}):\n"
        made_class = f"{taking}        super().__init__({given})\n"
        return head + (made_class if style == "class" else made)
    names = [*form.positional, *(["*", *form.named] if form.named else [])]
    names += [f"{name}=None" for name in form.keywords]
    work = f"effect({spec.slot!r}, dict(locals()))"
    if style == "def":
        return head + f"def hook({', '.join(names)}):\n    return {work}\n"
    if style == "async def":
        asynchronous = f"async def hook({', '.join(names)}):\n    return await later({work})\n"
        if form.construct is None:
            return head + asynchronous
    start = ""
    if form.construct is not None:
        start = (
            f"    def __init__(self, {', '.join(form.construct)}):\n"
            f"        hook_effects.construct({spec.slot!r}, dict(locals()))\n\n"
        )
    prefix, result = ("async ", f"await later({work})") if style == "async def" else ("", work)
    call = f"    {prefix}def __call__(self, {', '.join(names)}):\n        return {result}\n"
    return head + "class hook:\n" + start + call


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("every_hook")
    tiny.make_model(directory / "model")
    tiny.make_rows(directory / "rows.jsonl")
    return directory


def flags_of(place: Path, run_dir: Path, spec: HookSpec, path: str) -> list[str]:
    """A run of two steps with one hook."""
    return [
        *("--hf-checkpoint", str(place / "model"), "--prompt-data", str(place / "rows.jsonl")),
        *("--label-key", "label", "--rm-type", "random", "--run-dir", str(run_dir)),
        *("--rollout-batch-size", "2", "--n-samples-per-prompt", "2", "--num-rollout", "2"),
        *("--rollout-max-response-len", "6", "--lr", "0.001", "--progress", "off"),
        *("--eval-prompt-data", "held", f"{place / 'rows.jsonl'}@[:2]", "--eval-interval", "1"),
        *("--no-check-hooks", "--no-use-tensorboard"),
        *FLAGS.get(spec.slot, []),
        *(spec.flag, path),
    ]


@pytest.mark.parametrize(("spec", "form", "style"), cases())
def test_a_hook_is_called_at_its_moment_and_its_work_arrives(
    spec: HookSpec, form: CallForm, style: str, place: Path, tmp_path: Path
) -> None:
    file = tmp_path / "user_code.py"
    file.write_text(source_of(spec, form, style))
    path = f"{file}:hook"
    assert bind(spec.slot, path, ArgsView(group_rm=True)).form is form
    SEEN.clear()
    run_dir = tmp_path / "run"
    report = run_training(resolve([], flags_of(place, run_dir, spec, path)))
    assert report.steps_done == report.num_steps
    calls = [given for slot, given in SEEN if slot == spec.slot]
    assert calls, "it was never called"
    wanted = {*form.positional, *form.named}
    if not form.makes:
        assert all(wanted <= set(given) for given in calls)
    for given in calls:
        look_at_arguments(given)
    CHECKS[spec.slot](Left(run_dir, calls, form))


def look_at_arguments(given: dict[str, Any]) -> None:
    """What every call form promises of the values it hands over."""
    if "args" in given:
        assert given["args"].rollout_batch_size == 2
        assert getattr(given["args"], "no_such_setting", 5) == 5
    if "sample" in given:
        assert isinstance(given["sample"], Sample)
    if "rollout_id" in given and given["rollout_id"] is not None:
        assert 0 <= given["rollout_id"] <= 3


class Left:
    """What a run left behind, and what its hook was given."""

    def __init__(self, run_dir: Path, calls: list[dict[str, Any]], form: CallForm) -> None:
        self.calls, self.form = calls, form
        rows = tiny.read_metrics(run_dir)
        self.steps = [row for row in rows if "time/train_s" in row]
        self.evals = [row for row in rows if any(name.startswith("eval/") for name in row)]
        self.samples = [
            json.loads(line)
            for file in sorted(run_dir.glob("samples/*step*.jsonl"))
            for line in file.read_text().splitlines()
        ]

    def marks(self) -> set[str | None]:
        """The marks on the samples that were trained on."""
        return {sample.get("metadata", {}).get("mark") for sample in self.samples}


def data_source(left: Left) -> None:
    assert left.marks() == {"source"}
    assert [given for slot, given in SEEN if slot == "data_source.save"]


def buffer_filter(left: Left) -> None:
    if "num_samples" in left.form.positional:
        assert all(given["num_samples"] > 0 for given in left.calls)
        assert "buffer filter" in left.marks()
    else:
        # The newest groups come first in what this filter leaves in the buffer.
        assert all(isinstance(given["samples"][0][0], Sample) for given in left.calls)


def rollout_function(left: Left) -> None:
    assert left.marks() == {"rollout"}
    assert [row["rollout/mine"] for row in left.steps] == [7.0, 7.0]
    steps = [given.get("call") or given.get("input") or given for given in left.calls]
    trained = [one for one in steps if not is_evaluation(one)]
    assert [rollout_id(one) for one in trained] == [0, 1]
    if left.form.construct is not None:
        constructed = [slot for slot, _ in SEEN if slot == "rollout_function.construct"]
        assert len(constructed) == 1


def eval_function(left: Left) -> None:
    assert [row["eval/mine/extra"] for row in left.evals] == [7.0, 7.0, 7.0]
    assert all(row["eval/mine/reward"] == 0.5 for row in left.evals)
    steps = [given.get("call") or given.get("input") or given for given in left.calls]
    assert [rollout_id(one) for one in steps] == [0, 1, 2]
    assert all(is_evaluation(one) for one in steps)


def is_evaluation(one: Any) -> bool:
    return bool(one["evaluation"] if isinstance(one, dict) else one.evaluation)


def rollout_id(one: Any) -> int:
    return int(one["rollout_id"] if isinstance(one, dict) else one.rollout_id)


def custom_generate_function(left: Left) -> None:
    assert {sample["response"] for sample in left.samples} == {"mine"}
    assert {tuple(sample["rollout_log_probs"]) for sample in left.samples} == {(-4.0, -4.0)}
    told = {is_evaluation(given.get("call") or given.get("input") or given) for given in left.calls}
    assert told == {True, False}


def rollout_sample_hook(left: Left) -> None:
    assert left.marks() == {"sample hook"}
    assert {given["evaluation"] for given in left.calls} == {True, False}
    assert {given["rollout_id"] for given in left.calls} >= {0, 1}


def custom_rm(left: Left) -> None:
    assert {sample["reward"] for sample in left.samples} == {0.25}
    if left.form.batched:
        sizes = {len(given["samples"]) for given in left.calls}
        assert sizes <= {1, 2} and 2 in sizes


def dynamic_sampling_filter(left: Left) -> None:
    dropped = sum(row.get("rollout/dynamic_filter/drop_mine", 0.0) for row in left.steps)
    assert dropped == 1.0
    assert all(len(given["group"]) == 2 for given in left.calls)
    refused = {sample.index for sample in left.calls[0]["group"]}
    assert not refused & {sample["index"] for sample in left.samples}


def rollout_sample_filter(left: Left) -> None:
    assert [row["train/tokens"] for row in left.steps] == [0.0, 0.0]
    assert all(sample["remove_sample"] for sample in left.samples)
    first = left.calls[0].get("groups") or left.calls[0]["samples"]
    assert isinstance(first[0], Sample if "samples" in left.form.positional else list)


def rollout_all_samples_process(left: Left) -> None:
    assert left.marks() == {"all samples"}
    for given in left.calls:
        source = given.get("get_samples") or given.get("data_source")
        if source is not None:
            assert callable(getattr(source, "get_samples", source))
            assert hasattr(source, "add_samples")


def custom_rollout_log_function(left: Left) -> None:
    assert [given["rollout_id"] for given in left.calls] == [0, 1]
    assert all(isinstance(given["samples"][0], Sample) for given in left.calls)
    times = [given.get("time_s", given.get("rollout_time")) for given in left.calls]
    assert all(seconds > 0 for seconds in times)
    # It said that it has logged: only what it put into the metrics itself is left of the rollout's.
    assert all("rollout/reward" not in row for row in left.steps)


def custom_eval_rollout_log_function(left: Left) -> None:
    assert [given["rollout_id"] for given in left.calls] == [0, 1, 2]
    assert all("rewards" in given["data"]["held"] for given in left.calls)
    assert all("eval/held/reward" not in row for row in left.evals)


def custom_reward_post_process(left: Left) -> None:
    assert [row["train/grad_norm"] for row in left.steps] == [0.0, 0.0]


def custom_convert_samples_to_train_data(left: Left) -> None:
    # One trained token per sample, and a reward that needs no group.
    assert [row["train/tokens"] for row in left.steps] == [4.0, 4.0]


def rollout_data_postprocess(left: Left) -> None:
    if left.form.positional == ("args",):
        assert len(left.calls) == 2
    elif {"samples", "flat_samples"} & set(left.form.positional):
        assert [row["train/tokens"] for row in left.steps] == [0.0, 0.0]
    else:
        assert [row["train/grad_norm"] for row in left.steps] == [0.0, 0.0]
        data = left.calls[0].get("data") or left.calls[0]["rollout_data"]
        assert {"tokens", "loss_masks", "log_probs", "advantages", "returns", "rewards"} <= set(
            data
        )


def custom_advantage_function(left: Left) -> None:
    assert [row["train/grad_norm"] for row in left.steps] == [0.0, 0.0]
    data = left.calls[0].get("data") or left.calls[0]["rollout_data"]
    assert {"tokens", "rewards", "log_probs", "kl", "metadata", "train_metadata"} <= set(data)


def custom_loss_function(left: Left) -> None:
    assert [row["train/grad_norm"] for row in left.steps] == [0.0, 0.0]
    assert all(row["train/mine"] > 0 for row in left.steps)
    given = left.calls[0]
    data = given["call"].data if "call" in given else given["batch"]
    assert {"metadata", "train_metadata", "rewards", "tokens"} <= set(data)


def custom_tis_function(left: Left) -> None:
    assert [row["train/grad_norm"] for row in left.steps] == [0.0, 0.0]
    assert all(math.isclose(row["train/mine"], 7.0, rel_tol=1e-5) for row in left.steps)


def custom_pg_loss_reducer_function(left: Left) -> None:
    assert [row["train/grad_norm"] for row in left.steps] == [0.0, 0.0]


CHECKS: dict[str, Callable[[Left], None]] = {
    check.__name__: check
    for check in (
        data_source,
        buffer_filter,
        rollout_function,
        eval_function,
        custom_generate_function,
        rollout_sample_hook,
        custom_rm,
        dynamic_sampling_filter,
        rollout_sample_filter,
        rollout_all_samples_process,
        custom_rollout_log_function,
        custom_eval_rollout_log_function,
        custom_reward_post_process,
        custom_convert_samples_to_train_data,
        rollout_data_postprocess,
        custom_advantage_function,
        custom_loss_function,
        custom_tis_function,
        custom_pg_loss_reducer_function,
    )
}


def owned() -> list[Any]:
    return [
        pytest.param(spec, form, id=f"{spec.slot}-{spec.forms.index(form)}")
        for spec in HOOKS
        if spec.owner is not None
        for form in spec.forms
    ]


@pytest.mark.parametrize(("spec", "form"), owned())
def test_a_hook_whose_owner_the_run_lacks_is_refused_in_one_line(
    spec: HookSpec, form: CallForm, place: Path, tmp_path: Path
) -> None:
    names = [*form.positional, *(["*", *form.named] if form.named else [])]
    methods = "".join(f"    def {name}(self, *args): ...\n" for name in form.makes)
    text = f"def hook({', '.join(names)}):\n    raise AssertionError('called')\n"
    if form.makes:
        text = f"class hook:\n    def __init__(self, {', '.join(names)}): ...\n{methods}"
    if form.shown:
        text = "hook = []\n"
    file = tmp_path / "user_code.py"
    file.write_text(text)
    (tmp_path / "not a model").mkdir()
    flags = flags_of(place, tmp_path / "run", spec, f"{file}:hook")
    flags += ["--hf-checkpoint", str(tmp_path / "not a model"), "--serve-router", "false"]
    # By a rule of the settings, where one knows what would call it.
    with pytest.raises((HookError, ConfigError)) as refused:
        run_training(resolve([], flags))
    leaf = spec.flag.removeprefix("--").replace("-", "_")
    assert (spec.flag in str(refused.value)) or (leaf in str(refused.value))
    assert "\n" not in str(refused.value)


def test_tools_of_multi_turn_generation_are_shown_run_and_masked(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny random model calls no tool: here every turn counts as a call.
    call = multi_turn.ToolCall("add", {"a": 1, "b": 2})
    monkeypatch.setitem(multi_turn.PARSERS, "qwen25", lambda text: [call])
    file = tmp_path / "my_tools.py"
    file.write_text(
        'tools = [{"type": "function", "function": {"name": "add"}}]\n'
        "async def execute(name, params):\n    return str(params['a'] + params['b'])\n"
    )
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input": [{"role": "user", "content": "1+2"}], "label": "3"}))
    spec = spec_of("generate_execute_tool_function")
    flags = flags_of(place, tmp_path / "run", spec, f"{file}:execute")
    flags += ["--generate-tool-specs-path", f"{file}:tools", "--hf-checkpoint", str(model)]
    flags += ["--custom-generate-function-path", "multi_turn", "--generate-max-turns", "2"]
    flags += ["--prompt-data", str(rows), "--rollout-stop", *"abcdefghij", "--no-eval-prompt-data"]
    flags += ["--no-eval-interval", "--rollout-max-response-len", "80", "--num-rollout", "1"]
    run_training(resolve([], flags))
    left = Left(tmp_path / "run", [], spec.forms[0])
    talked = [sample for sample in left.samples if "tool: 3" in sample["response"]]
    assert talked
    for sample in talked:
        observed = len(" tool: 3 ")
        assert sample["loss_mask"].count(0) == observed
