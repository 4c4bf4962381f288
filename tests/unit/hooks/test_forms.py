"""Forms that only names and annotations tell apart, and hooks that may be given several times."""

import argparse
import asyncio

import pytest

from dovetail.config.resolve import resolve
from dovetail.config.run import RunConfig
from dovetail.config.sections import HooksConfig
from dovetail.hooks import ArgsView, bind, bind_hooks
from dovetail.hooks.match import match
from dovetail.hooks.table import spec_of
from dovetail.types import ConfigError, GenerateFnInput, HookError, Sample

ARGS = ArgsView(RunConfig())


def passed(slot, target):
    form = match(target, spec_of(slot)).form
    return form.positional or form.named


def test_sample_filters_get_groups_unless_they_say_samples():
    slot = "rollout_sample_filter"
    assert passed(slot, lambda groups: 0) == ("groups",)
    assert passed(slot, lambda data: 0) == ("groups",)
    assert passed(slot, lambda samples: 0) == ("samples",)
    assert passed(slot, lambda args, groups: 0) == ("args", "groups")
    assert passed(slot, lambda args, data: 0) == ("args", "groups")
    assert passed(slot, lambda args, samples: 0) == ("args", "samples")

    def flat(args, data: list[Sample]): ...
    def nested(args, samples: list[list[Sample]]): ...
    def quoted(args, data: "list[Sample]"): ...

    assert passed(slot, flat) == passed(slot, quoted) == ("args", "samples")
    assert passed(slot, nested) == ("args", "groups")


def test_postprocess_takes_one_two_or_three():
    slot = "rollout_data_postprocess"
    assert passed(slot, lambda data: 0) == ("data",)
    assert passed(slot, lambda batch: 0) == ("data",)
    assert passed(slot, lambda args: 0) == ("args",)
    assert passed(slot, lambda args, samples: 0) == ("args", "samples")
    assert passed(slot, lambda args, rollout_data: 0) == ("args", "rollout_data")
    assert passed(slot, lambda args, x: 0) == ("args", "rollout_data")

    def flat(args, samples: list[Sample]): ...
    def nested(args, batch: "list[list[Sample]]"): ...

    assert passed(slot, flat) == ("args", "flat_samples")
    assert passed(slot, nested) == ("args", "samples")
    three = ("args", "rollout_id", "rollout_data")
    assert passed(slot, lambda args, rollout_id, rollout_data: 0) == three
    assert passed(slot, lambda a, b, c: 0) == three


def test_all_samples_takes_two_or_three():
    slot = "rollout_all_samples_process"
    assert passed(slot, lambda groups, source: 0) == ("groups", "data_source")
    assert passed(slot, lambda args, all_samples: 0) == ("args", "all_samples")
    called = ("args", "all_samples", "get_samples")
    assert passed(slot, lambda args, all_samples, fetch: 0) == called
    documented = ("args", "all_samples", "data_source")
    assert passed(slot, lambda args, all_samples, data_source: 0) == documented


def test_generate_functions_that_say_input_get_miles_record():
    slot = "custom_generate_function"

    class Mine:
        def __call__(self, given: GenerateFnInput): ...

    class Named:
        async def __call__(self, input): ...

    assert passed(slot, Mine) == passed(slot, Named) == passed(slot, lambda input: 0) == ("input",)
    assert passed(slot, lambda call: 0) == ("call",)


def test_an_annotation_says_args_as_well_as_the_name():
    def annotated(a: argparse.Namespace, s=None): ...

    assert passed("custom_convert_samples_to_train_data", annotated) == ("args", "samples")
    assert passed("custom_convert_samples_to_train_data", lambda a, s=None: 0) == ("samples",)


def test_log_functions_are_told_by_count_and_names():
    slot = "custom_rollout_log_function"
    native = ("rollout_id", "samples", "metrics", "time_s")
    assert passed(slot, lambda a, b, c, d: 0) == native
    family = ("rollout_id", "args", "samples", "rollout_extra_metrics", "rollout_time")
    assert passed(slot, lambda rollout_id, args, samples, extra, t=0: 0) == family
    assert passed(slot, lambda *args, **kwargs: 0) == family


def test_functions_called_by_keyword_must_name_one_and_require_no_other():
    slot = "custom_tis_function"
    assert passed(slot, lambda call: 0) == ("call",)
    assert passed(slot, lambda args, pg_loss, loss_masks: 0)[:2] == ("args", "pg_loss")
    spec = spec_of(slot)
    with pytest.raises(HookError, match="yours requires 'tau', which is not passed"):
        match(lambda args, pg_loss, tau: 0, spec)
    with pytest.raises(HookError, match="yours names none of 'args' and 'pg_loss'"):
        match(lambda: 0, spec)
    with pytest.raises(HookError, match="yours requires 'args' and 'pg_loss'"):
        match(lambda args, pg_loss, /: 0, spec, family="slime")


def test_data_sources_are_classes_or_functions_with_the_methods_they_need():
    class Family:
        def __init__(self, args): ...
        def get_samples(self, n): ...
        def add_samples(self, samples): ...
        def save(self, rollout_id): ...
        def load(self, rollout_id=None): ...

    class Forgot(Family):
        load = None

    assert passed("data_source", Family) == ("args",)
    assert passed("data_source", lambda call: 0) == ("call",)
    with pytest.raises(HookError, match="your class has no load"):
        match(Forgot, spec_of("data_source"), family="slime")


def test_sample_hooks_run_in_order_each_with_what_came_before(tmp_path):
    (tmp_path / "several.py").write_text(
        "from dovetail.types import Sample\n"
        "def first(args, sample, rollout_id, **kwargs):\n"
        "    assert (rollout_id, kwargs) == (3, {'evaluation': True})\n"
        "    return Sample(index=10 + sample.index)\n"
        "async def second(sample):\n"
        "    sample.index *= 2\n"
    )
    paths = [f"{tmp_path}/several.py:{name}" for name in ("first", "second")]
    hook = bind_hooks(HooksConfig(rollout_sample_hook_path=paths), ARGS)["rollout_sample_hook"]
    made = asyncio.run(hook(Sample(index=1), rollout_id=3, evaluation=True))
    assert made.index == 22 and [part.path for part in hook.parts] == paths


def hooks_of(*flags, files=()):
    return resolve(files, flags).config.hooks


def test_a_repeated_flag_of_a_list_of_functions_adds_up_and_replaces_a_files(tmp_path):
    flag = "--rollout-sample-hook-path"
    assert hooks_of(flag, "a.b", flag, "c.d", "e.f").rollout_sample_hook_path == [
        "a.b",
        "c.d",
        "e.f",
    ]
    file = tmp_path / "run.toml"
    file.write_text('[hooks]\nrollout_sample_hook_path = ["x.y"]\n')
    assert hooks_of(files=[file]).rollout_sample_hook_path == ["x.y"]
    assert hooks_of(flag, "a.b", files=[file]).rollout_sample_hook_path == ["a.b"]
    assert hooks_of("--no-rollout-sample-hook-path", files=[file]).rollout_sample_hook_path == []
    other = ("--rollout-stop", "a", "--rollout-stop", "b")
    assert resolve([], other).config.rollout.rollout_stop == ["b"]


def test_the_families_names_of_router_middleware_are_understood(tmp_path):
    slime, miles = "--slime-router-middleware-paths", "--miles-router-middleware-paths"
    assert hooks_of(slime, "a.B").router_middleware_paths == ["a.B"]
    assert hooks_of(slime, "a.B", miles, "c.D", "e.F").router_middleware_paths == [
        "a.B",
        "c.D",
        "e.F",
    ]
    with pytest.raises(ConfigError, match="slime-router-middleware-path"):
        hooks_of("--slime-router-middleware-pathz", "a.B")


def test_names_that_another_value_is_passed_for_fit_no_form():
    def swapped(args, rollout_id, samples, extra, time): ...

    with pytest.raises(HookError, match="your 'args' stands where 'rollout_id' is passed"):
        match(swapped, spec_of("custom_rollout_log_function"))
    with pytest.raises(HookError, match="your 'sample' stands where 'args' is passed"):
        match(lambda sample, args: 0, spec_of("custom_rm"))


def test_router_middleware_is_a_class_with_dispatch_or_an_asgi_application(tmp_path):
    file = tmp_path / "middle.py"
    file.write_text(
        "class Plain:\n"
        "    def __init__(self, app, *, router): ...\n"
        "    async def __call__(self, scope, receive, send): ...\n"
        "class Bare:\n"
        "    def __init__(self, app): self.app = app\n"
        "    async def __call__(self, scope, receive, send): ...\n"
        "class Neither:\n"
        "    def __init__(self, app, *, router): ...\n",
        encoding="utf-8",
    )
    assert bind("router_middleware", f"{file}:Plain", ARGS).form.origin == "ASGI class"
    assert bind("router_middleware", f"{file}:Bare", ARGS)("inner", "router").app == "inner"
    with pytest.raises(HookError, match="your class has no dispatch"):
        bind("router_middleware", f"{file}:Neither", ARGS)
