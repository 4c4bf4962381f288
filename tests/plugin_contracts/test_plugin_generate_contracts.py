"""What functions that make one sample must keep: --custom-generate-function-path, and the sample
hooks that run right after it.

    python test_plugin_generate_contracts.py --custom-generate-function-path my_project.agent.run

`--help` lists the flags; `contract_paths.py` says how else functions are named.
"""

import asyncio
import sys

import pytest
from contract_paths import run_as_script, targets
from contract_world import World, check_answered

from dovetail.types import Sample

SLOTS = ("custom_generate_function", "rollout_sample_hook")
SAMPLES = {
    "custom_generate_function": (
        "slime_style.py:custom_generate",
        "slime_style.py:generate_by_http",
        "vime_style.py:custom_generate",
        "vime_style.py:generate_by_http",
        "miles_style.py:generate",
        "miles_style.py:Generate",
        "native.py:generate",
    ),
    "rollout_sample_hook": ("slime_style.py:stamp", "native.py:stamp"),
}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def each(slot):
    return pytest.mark.parametrize("path", targets(SLOTS, SAMPLES, slot))


def answered(world, path, sample, **how):
    """What the function makes of one prompt, as a list, and whether it gave back a list."""
    hook = world.bound("custom_generate_function", path)
    made = world.call(hook, world.generate_call(sample, **how))
    return made if isinstance(made, list) else [made]


def prompt(world):
    """A sample as a data source gives it."""
    return world.source.get_samples(1)[0][0]


@each("custom_generate_function")
def test_its_parameters_fit_a_call_form(world, path):
    hook = world.bound("custom_generate_function", path)
    assert hook.form in hook.spec.forms
    print(f"{path} is called as {hook.form.label}: {hook.form.signature}")


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@each("custom_generate_function")
def test_it_gives_answered_samples(world, path, evaluation):
    made = answered(world, path, prompt(world), evaluation=evaluation)
    assert made, "no sample"
    for sample in made:
        check_answered(sample)


@each("custom_generate_function")
def test_what_it_makes_begins_with_the_prompt_and_keeps_its_place(world, path):
    given = prompt(world)
    ids, place = world.tokenizer.encode(given.prompt), (given.group_index, given.index)
    label = given.label
    for sample in answered(world, path, given):
        start = sample.tokens[: len(sample.tokens) - sample.response_length]
        # An agent may have wrapped the prompt in a conversation of its own.
        assert start, "no prompt tokens before the response"
        if len(start) == len(ids):
            assert start == ids, "the prompt's tokens were changed"
        assert (sample.group_index, sample.index) in (place, (None, None)), "it was renumbered"
        assert sample.label == label, "the label was changed"


@each("custom_generate_function")
def test_what_it_sampled_is_trained_on(world, path):
    made = answered(world, path, prompt(world))
    trained = sum(sample.effective_response_length for sample in made)
    assert trained > 0, "loss_mask is 0 everywhere"
    for sample in made:
        if sample.rollout_log_probs is not None:
            mask = sample.loss_mask or [1] * sample.response_length
            odd = [p for p, m in zip(sample.rollout_log_probs, mask, strict=True) if m and p > 0]
            assert not odd, f"logprobs above 0: {odd}"


@each("custom_generate_function")
def test_siblings_that_run_at_once_stay_apart(world, path):
    hook = world.bound("custom_generate_function", path)
    group = world.source.get_samples(1)[0]
    wanted = [(sample.index, sample.prompt) for sample in group]

    def at_once(*calls):
        async def run():
            return await asyncio.gather(*(hook(call) for call in calls))

        return run()

    calls = [world.generate_call(sample) for sample in group]
    results = world.call(_Several(hook, at_once), *calls)
    listed = [made if isinstance(made, list) else [made] for made in results]
    seen = [(made[0].index, made[0].prompt) for made in listed]
    assert len(seen) == len(wanted)
    for (index, text), (own, own_text) in zip(seen, wanted, strict=True):
        assert index in (own, None) and text == own_text, "siblings got mixed up"
    every = [id(sample) for made in listed for sample in made]
    assert len(set(every)) == len(every), "two siblings came back as one object"


class _Several:
    """A hook called several times at once."""

    def __init__(self, hook, function):
        self.spec, self.form, self.path, self._function = hook.spec, hook.form, hook.path, function

    def __call__(self, *values):
        return self._function(*values)


@each("custom_generate_function")
def test_it_leaves_the_sampling_parameters_of_others_alone(world, path):
    before = world.generate_call(prompt(world)).sampling_params
    answered(world, path, prompt(world))
    assert world.generate_call(prompt(world)).sampling_params.keys() == before.keys()
    assert world.sampling.max_new_tokens == before["max_new_tokens"]


@each("custom_generate_function")
def test_it_comes_back_when_the_step_is_full(world, path):
    for sample in answered(world, path, prompt(world), aborted=True):
        assert isinstance(sample, Sample)
        Sample.Status(sample.status)


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@each("rollout_sample_hook")
def test_a_sample_hook_gives_a_usable_sample(world, path, evaluation):
    hook = world.bound("rollout_sample_hook", path)
    for given in world.finished_groups(1)[0]:
        place, tokens = (given.group_index, given.index), list(given.tokens)
        made = world.call(hook, given, 3, evaluation)
        check_answered(made)
        assert (made.group_index, made.index) == place, "it was renumbered"
        assert made.tokens[: len(tokens) - given.response_length], "the prompt is gone"


@each("rollout_sample_hook")
def test_a_sample_hook_takes_aborted_samples_too(world, path):
    given = prompt(world)
    given.tokens = world.tokenizer.encode(given.prompt)
    given.status = Sample.Status.ABORTED
    made = world.call(world.bound("rollout_sample_hook", path), given, 3, False)
    assert isinstance(made, Sample)


if __name__ == "__main__":
    sys.exit(run_as_script(__file__, SLOTS))
