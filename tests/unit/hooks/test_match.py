"""Which call form real plugins' signatures are taken for."""

import functools

import pytest

from dovetail.hooks.match import is_async, match, place
from dovetail.hooks.table import spec_of
from dovetail.types import HookError, Sample

ROLLOUT, GENERATE, REWARD, FILTER, BUFFER = (
    spec_of(slot)
    for slot in (
        "rollout_function",
        "custom_generate_function",
        "custom_rm",
        "dynamic_sampling_filter",
        "buffer_filter",
    )
)


def positional(target, spec, **kwargs):
    found = match(target, spec, **kwargs)
    return (*found.form.positional, *(f"{name}=" for name in found.keywords))


def test_rollout_functions_are_told_apart_by_count():
    async def documented(args, rollout_id, *, evaluation=False): ...
    def called(args, rollout_id, data_source, evaluation=False): ...
    def lenient(args, rollout_id, data_source=None, evaluation=False): ...
    def two(args, rollout_id, evaluation=False): ...
    def kwargs(args, rollout_id, data_source, **kwargs): ...
    def other_names(a, rid, source, evaluation=False): ...
    async def native(call): ...

    three = ("args", "rollout_id", "data_source", "evaluation=")
    assert positional(documented, ROLLOUT) == ("args", "rollout_id", "evaluation=")
    assert positional(called, ROLLOUT) == three
    assert positional(lenient, ROLLOUT) == three
    assert positional(two, ROLLOUT) == ("args", "rollout_id", "evaluation=")
    assert positional(kwargs, ROLLOUT) == three
    assert positional(other_names, ROLLOUT) == three
    assert positional(native, ROLLOUT) == ("call",)


def test_a_rollout_class_is_constructed_with_what_its_constructor_names():
    class Miles:
        def __init__(self, input): ...
        def __call__(self, input): ...

    class Plain:
        def __call__(self, args, rollout_id, data_source, evaluation=False): ...

    class WithArgs(Plain):
        def __init__(self, args): ...

    assert match(Miles, ROLLOUT).construct == ("constructor_input",)
    assert match(Plain, ROLLOUT).construct == ()
    assert match(WithArgs, ROLLOUT).construct == ("args",)
    assert match(Plain(), ROLLOUT).construct is None


def test_evaluation_is_passed_to_generate_functions_that_name_it_only():
    async def plain(args, sample, sampling_params): ...
    async def named(args, sample, sampling_params, evaluation=False): ...
    async def required(args, sample, sampling_params, evaluation): ...
    async def keyword(args, sample, sampling_params, *, evaluation): ...
    async def kwargs(args, sample, sampling_params, **kwargs): ...
    async def other(cfg, s, sp, temperature=1.0): ...

    three = ("args", "sample", "sampling_params")
    for target in (plain, kwargs, other):
        assert positional(target, GENERATE) == three
    for target in (named, required, keyword):
        assert positional(target, GENERATE) == (*three, "evaluation=")


def test_rewards_take_a_sample_or_a_group_as_their_parameter_says():
    def named(args, sample, **kwargs): ...
    def group(args, samples, **kwargs): ...
    def typed(args, x: Sample): ...
    def typed_group(args, x: list[Sample]): ...
    def text_group(args, x: "list[Sample]", **kwargs): ...
    def either(args, x: Sample | list[Sample]): ...
    def silent(args, x): ...
    def native(sample): ...
    def native_group(samples): ...

    for batched in (False, True):
        for target in (named, typed, native):
            assert not match(target, REWARD, batched=batched).form.batched
        for target in (either, silent):
            assert match(target, REWARD, batched=batched).form.batched is batched
    for target in (group, typed_group, text_group, native_group):
        assert match(target, REWARD, batched=True).form.batched
        with pytest.raises(HookError, match=r"takes a group of samples.*--group-rm"):
            match(target, REWARD, batched=False)


def test_the_first_name_decides_where_counts_do_not():
    def native(group, threshold=0.5): ...
    def unknown(things, threshold=0.5): ...
    def slime(args, group, **kwargs): ...
    def defaults(args, group=None): ...

    assert positional(native, FILTER) == ("group",)
    assert positional(unknown, FILTER) == ("group",)
    assert positional(slime, FILTER) == positional(defaults, FILTER) == ("args", "group")


def test_buffer_filters_of_one_two_and_four_parameters():
    def one(samples): ...
    def documented(args, samples): ...
    def native(buffer, n): ...
    def called(args, rollout_id, buffer, num_samples): ...

    assert positional(one, BUFFER) == ("samples",)
    assert positional(documented, BUFFER) == ("args", "samples")
    assert positional(native, BUFFER) == ("buffer", "num_samples")
    assert positional(called, BUFFER) == ("args", "rollout_id", "buffer", "num_samples")


def test_anything_goes_is_taken_for_the_family_of_the_flags_and_says_so():
    def anything(*args, **kwargs): ...

    found = match(anything, FILTER)
    assert found.form.positional == ("args", "group") and "native:" in (found.notice or "")
    assert match(anything, FILTER, family="native").form.positional == ("group",)
    assert match(anything, FILTER, family="native").notice is None


def test_partials_methods_and_decorated_functions_show_their_own_parameters():
    class Judge:
        def score(self, args, sample): ...

    def outer(weight, args, sample): ...

    @functools.wraps(outer)
    def vague(*args, **kwargs): ...

    @functools.wraps(outer)
    def filled_in(args, sample): ...

    assert positional(Judge().score, REWARD) == ("args", "sample")
    assert positional(functools.partial(outer, 2.0), REWARD) == ("args", "sample")
    assert positional(filled_in, REWARD) == ("args", "sample")
    with pytest.raises(HookError, match="yours requires 'sample'"):
        match(vague, REWARD)


def test_a_forced_family_leaves_only_its_forms():
    def two(args, sample): ...

    with pytest.raises(HookError, match="no call form of the family 'native'"):
        match(two, REWARD, family="native")


def test_the_message_says_what_differs_per_form():
    def wrong(args, sample, tokenizer, *, url): ...

    with pytest.raises(HookError) as caught:
        match(wrong, REWARD)
    text = str(caught.value)
    assert "native: (sample) - yours requires 'sample' and 'tokenizer' and 'url'" in text
    assert "(args, sample) - yours requires 'tokenizer' and 'url', which are not passed" in text

    def nothing(): ...

    with pytest.raises(HookError, match="yours has no place for 'sample'"):
        match(nothing, REWARD)


def test_async_is_seen_through_partials_classes_and_objects():
    async def function(x): ...

    class Callable:
        async def __call__(self, x): ...

    for target in (function, functools.partial(function, 1), Callable, Callable()):
        assert is_async(target)
    assert not is_async(len) and place(function).startswith(__file__)
