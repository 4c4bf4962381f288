"""Every row of the hook table x call form x kind of callable: found, called, answered."""

import asyncio
import inspect
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dovetail.config.leaves import leaves
from dovetail.config.run import RunConfig
from dovetail.config.sections import HooksConfig
from dovetail.hooks import HOOKS, ArgsView, bind, bind_hooks, spec_of
from dovetail.hooks.foreign_source import SamplesAccess, UserSource
from dovetail.hooks.spec import OWNERS, Kind
from dovetail.types import (
    DynamicFilterOutput,
    EvalOutput,
    GenerateFnInput,
    HookError,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnTrainInput,
    RolloutOutput,
    Sample,
)
from tests.contract.hook_world import (
    GIVEN,
    case_of,
    check,
    source_of,
    styles_of,
)

CALLED = [spec for spec in HOOKS if spec.kind is not Kind.OBJECT]


def cases():
    for spec in HOOKS:
        for form in spec.forms:
            for style in styles_of(form):
                case = case_of(spec, form)
                yield pytest.param(spec, form, case, style, id=f"{case}-{form.label}-{style}")


def finished(result):
    return asyncio.run(result) if inspect.isawaitable(result) else result


def seen_by(hook):
    target = hook.invoke.target
    target = getattr(target, "func", target)
    return inspect.getmodule(target if hasattr(target, "__module__") else type(target)).SEEN


def check_values(spec, got):
    if "args" in got:
        assert got["args"].rollout_batch_size == 8
    if "sampling_params" in got:
        assert got["sampling_params"]["sampling_seed"] == 9
    if "evaluation" in got:
        assert got["evaluation"] is (spec.slot != "rollout_function")
    if "call" in got:
        assert got["call"].args.rollout_batch_size == 8
    if spec.slot == "custom_generate_function" and "input" in got:
        assert isinstance(got["input"], GenerateFnInput)
        assert got["input"].args.rollout_batch_size == 8 and got["input"].evaluation
    if spec.slot in ("rollout_function", "eval_function") and "input" in got:
        kind = RolloutFnEvalInput if spec.slot == "eval_function" else RolloutFnTrainInput
        assert type(got["input"]) is kind and got["input"].rollout_id == 4
        assert got["input"].weight_version == 3
    if spec.slot == "rollout_function" and "data_source" in got:
        assert (got["rollout_id"], got["data_source"]) == (4, "source")
    check_more_values(spec, got)


def check_more_values(spec, got):
    if spec.slot == "rollout_sample_hook":
        assert (got["rollout_id"], got["evaluation"], got["sample"].index) == (4, True, 1)
    if spec.slot == "rollout_sample_filter":
        flat = got.get("samples") or [s for group in got["groups"] for s in group]
        assert [sample.index for sample in flat] == [0, 1, 2, 3]
    if spec.slot == "rollout_all_samples_process":
        access = got.get("data_source", got.get("get_samples"))
        assert access is None or (len(access(2)) == 2 and access.given == 2)
        assert access is None or isinstance(access, SamplesAccess)
    if spec.slot == "custom_rollout_log_function":
        assert got["rollout_id"] == 4 and got.get("time_s", got.get("rollout_time")) == 2.5
        assert got.get("metrics", got.get("rollout_extra_metrics")) == {"mean": 0.5}
    if spec.slot == "rollout_data_postprocess":
        data = got.get("data", got.get("rollout_data"))
        assert data is None or data["rewards"] == [1.0, -1.0]
        assert got.get("rollout_id", 4) == 4
        assert [len(group) for group in got.get("samples", [])] in ([], [2])
        assert len(got.get("flat_samples", "of")) == 2
    if spec.slot == "custom_tis_function" and "pg_loss" in got:
        assert got["pg_loss"].tolist() == [1.0, 2.0, 3.0] and got["total_lengths"] == [3, 2]
        assert got["max_seq_lens"] is None and len(got) == 9
    if spec.slot == "custom_pg_loss_reducer_function":
        assert got.get("per_token", got.get("calculate_per_token_loss")) is True


@pytest.mark.parametrize(("spec", "form", "case", "style"), list(cases()))
def test_every_form_is_found_called_and_answered(spec, form, case, style, tmp_path):
    file = tmp_path / "user_hook.py"
    file.write_text(source_of(form, case, style))
    config = RunConfig.model_validate({"reward": {"group_rm": form.batched}})
    hook = bind(spec.slot, f"{form.families[0]}:{file}:hook", ArgsView(config))
    assert (hook.form.positional, hook.form.named) == (form.positional, form.named)
    given = GIVEN[case]()
    result = finished(hook(*given))
    noted = seen_by(hook)
    called = next(got for got in noted if isinstance(got, dict))
    assert set(called) == {*form.positional, *form.named, *form.keywords}
    check(case, result, given)
    check_values(spec, called)
    if style == "class with args":
        assert noted[0] == 1e-6
    if form.construct is not None:
        assert isinstance(noted[0], RolloutFnConstructorInput)
        assert noted[0].data_source == "source" and noted[0].args.rollout_batch_size == 8


class _Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "hi"}
        body = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def session_url():
    """Whatever is asked there is answered."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("spec", HOOKS, ids=lambda spec: spec.slot)
def test_every_example_runs_as_it_is_printed(spec, tmp_path, session_url):
    file = tmp_path / "example.py"
    file.write_text(spec.example)
    hook = bind(spec.slot, f"{file}:{spec.example_name}", ArgsView(RunConfig()))
    assert "native" in hook.form.families
    given = GIVEN[spec.slot]()
    if spec.slot == "custom_agent_function":
        given = (session_url, *given[1:])
    result = finished(hook(*given))
    expected = {
        "data_source": UserSource,
        "custom_generate_function": Sample,
        "rollout_sample_hook": Sample,
        "rollout_function": RolloutOutput,
        "eval_function": EvalOutput,
        "custom_rm": float,
        "dynamic_sampling_filter": DynamicFilterOutput,
        "buffer_filter": list,
        "custom_reward_post_process": tuple,
        "custom_convert_samples_to_train_data": dict,
        "custom_loss_function": tuple,
        "custom_tis_function": tuple,
        "generate_tool_specs": list,
        "session_sample_picker": list,
    }
    assert isinstance(result, expected.get(spec.slot, object))
    check_effect(spec.slot, result, given)


def check_effect(slot, result, given):
    """What the examples say that they do."""
    if slot == "data_source":
        assert [len(group[0].prompt) for group in result.get_samples(1)] == [4]
        assert result.state_dict() == {"given": 2}
    elif slot == "rollout_sample_hook":
        assert result.metadata == {"long": False}
    elif slot == "rollout_all_samples_process":
        assert given[1].back == []
    elif slot == "custom_rollout_log_function":
        assert given[2]["rollout/median_length"] == 2 and result is False
    elif slot == "custom_eval_rollout_log_function":
        assert given[2]["eval/set/best"] == 1.0 and result is False
    elif slot == "rollout_data_postprocess":
        assert given[1]["advantages"][0].tolist() == [3.0, -3.0]
    elif slot == "custom_advantage_function":
        assert [a.tolist() for a in given[0]["returns"]] == [[1.0, 1.0], [-1.0]]
    elif slot == "custom_loss_function":
        # Ratios are 1: -1 averaged over two tokens, and 3.
        assert result[0].item() == 2.0
    elif slot == "custom_tis_function":
        # Only the last token differs, by e^2, cut at 2.
        assert result[0].tolist() == [1.0, 2.0, 6.0]
    elif slot == "custom_pg_loss_reducer_function":
        assert result(given[0].loss_masks[0].new_tensor([512, 7, 512])).item() == 1.0
    elif slot == "router_middleware":
        assert result.headers == {"x-seen": "1"}
    elif slot == "generate_execute_tool_function":
        assert result == "3"
    elif slot == "custom_agent_function":
        assert result == {"answer": "hi"}


@pytest.mark.parametrize("spec", HOOKS, ids=lambda spec: spec.slot)
def test_every_row_is_complete_and_has_its_knob(spec):
    assert spec.leaf in HooksConfig.model_fields
    assert leaves()[spec.leaf].is_list is spec.repeatable
    assert spec.summary == HooksConfig.model_fields[spec.leaf].description
    for text in (spec.summary, spec.returns, spec.when, spec.doc, spec.default, spec.example):
        assert text.strip()
    assert spec.time_limit is None or leaves()[spec.time_limit].kind == "float"
    families = {family for form in spec.forms for family in form.families}
    assert "native" in families and families <= {"native", "slime", "vime", "miles"}
    if spec.owner is None:
        assert len(families) == 4


def test_every_knob_has_its_row():
    ending = re.compile("_(paths?|hook|matcher)$")
    named = {leaf for leaf in HooksConfig.model_fields if ending.search(leaf)}
    assert {spec.leaf for spec in HOOKS} == named - {"custom_config_path"}


@pytest.mark.parametrize("spec", [spec for spec in HOOKS if spec.owner], ids=lambda spec: spec.slot)
def test_a_run_without_the_owner_matches_and_then_refuses(spec, tmp_path):
    (tmp_path / "good.py").write_text(spec.example)
    (tmp_path / "bad.py").write_text("def hook(a, b, c, d, e, f, g, h): ...\n")

    def hooks(path):
        return HooksConfig(**{spec.leaf: [path] if spec.repeatable else path})

    good = hooks(f"{tmp_path}/good.py:{spec.example_name}")
    with pytest.raises(HookError) as caught:
        bind_hooks(good)
    text = str(caught.value)
    assert "\n" not in text and spec.flag in text and OWNERS[spec.owner] in text
    assert "leave the flag out" in text
    assert list(bind_hooks(good, None, {spec.owner})) == [spec.slot]
    with pytest.raises(HookError, match=r"fits no call form|gave back a function"):
        bind_hooks(hooks(f"{tmp_path}/bad.py:hook"))


@pytest.mark.parametrize("spec", HOOKS, ids=lambda spec: spec.slot)
def test_registered_names_bind(spec):
    for name in spec.registered:
        assert bind(spec.slot, name, ArgsView(RunConfig())).path == name


@pytest.mark.parametrize("spec", CALLED, ids=lambda spec: spec.slot)
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


@pytest.mark.parametrize("spec", CALLED, ids=lambda spec: spec.slot)
def test_what_is_not_callable_is_refused(spec, tmp_path):
    file = tmp_path / "thing.py"
    file.write_text("hook = 3\nclass NoCall:\n    pass\n")
    with pytest.raises(HookError, match=r"thing\.py:hook is of type int, not a function"):
        bind(spec.slot, f"{file}:hook")
    with pytest.raises(HookError, match=r"your class has no (__call__|get_samples|put)"):
        bind(spec_of(spec.slot).slot, f"{file}:NoCall")
