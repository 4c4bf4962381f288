"""What functions between rollout and training must keep: --custom-rollout-log-function-path,
--custom-eval-rollout-log-function-path, --custom-reward-post-process-path,
--custom-convert-samples-to-train-data-path, --rollout-data-postprocess-path, and those of the loss.

    python test_plugin_runtime_hook_contracts.py --custom-reward-post-process-path my_project.shape

`--help` lists the flags; `contract_paths.py` says how else functions are named.
"""

import math
import sys
from numbers import Real

import pytest
import torch
from contract_paths import run_as_script, targets
from contract_world import World, changed, frozen

from dovetail.batch.columns import columns_of
from dovetail.batch.convert import rows_from_samples
from dovetail.types import CorrectionCall, LossCall, ReducerCall

SLOTS = (
    "custom_rollout_log_function",
    "custom_eval_rollout_log_function",
    "custom_reward_post_process",
    "custom_convert_samples_to_train_data",
    "rollout_data_postprocess",
    "custom_advantage_function",
    "custom_tis_function",
    "custom_pg_loss_reducer_function",
    "custom_loss_function",
)
SAMPLES = {
    "custom_rollout_log_function": ("slime_style.py:log_rollout", "native.py:log_rollout"),
    "custom_eval_rollout_log_function": ("slime_style.py:log_eval", "native.py:log_eval"),
    "custom_reward_post_process": ("slime_style.py:centre", "native.py:post_process"),
    "custom_convert_samples_to_train_data": ("slime_style.py:convert", "native.py:convert"),
    "rollout_data_postprocess": (
        "slime_style.py:mask_long",
        "vime_style.py:postprocess",
        "miles_style.py:postprocess",
        "native.py:scale_advantages",
    ),
    "custom_advantage_function": ("slime_style.py:advantage", "native.py:advantage"),
    "custom_tis_function": (
        "slime_style.py:truncated_weights",
        "miles_style.py:all_keywords_tis",
        "native.py:weights",
    ),
    "custom_pg_loss_reducer_function": ("slime_style.py:constant_divisor", "native.py:reducer"),
    "custom_loss_function": ("slime_style.py:loss", "native.py:loss"),
}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def each(slot):
    return pytest.mark.parametrize("path", targets(SLOTS, SAMPLES, slot))


PATHS = [(slot, path) for slot in SLOTS for path in targets(SLOTS, SAMPLES, slot)]


@pytest.mark.parametrize(("slot", "path"), PATHS)
def test_it_loads_and_its_parameters_fit_a_call_form(world, slot, path):
    hook = world.bound(slot, path)
    assert hook.form in hook.spec.forms
    print(f"{path} is called as {hook.form.label}: {hook.form.signature}")


def samples_of(world):
    return [sample for group in world.finished_groups(3) for sample in group]


def training_data(world):
    """The data that training hooks see, and the samples that it came from."""
    samples = samples_of(world)
    rows = rows_from_samples(samples, reward_key=world.config.reward.reward_key)
    data = columns_of(rows)
    lengths = data["response_lengths"]
    data["log_probs"] = [torch.full((n,), -1.0) for n in lengths]
    data["kl"] = [torch.zeros(n) for n in lengths]
    data["advantages"] = [torch.linspace(-1.0, 1.0, n) for n in lengths]
    data["returns"] = [one.clone() for one in data["advantages"]]
    return data, samples


@each("custom_rollout_log_function")
def test_a_rollout_log_function_says_whether_it_replaces_the_default(world, path):
    samples, metrics = samples_of(world), {"rollout/reward": 0.5}
    before = frozen([samples])
    skips = world.call(world.bound("custom_rollout_log_function", path), 4, samples, metrics, 1.5)
    assert isinstance(skips, bool)
    assert changed(before, [samples]) <= {"metadata"}, "a log function changed the samples"
    odd = {name: value for name, value in metrics.items() if not isinstance(value, Real)}
    assert not odd, f"metrics that are no numbers: {odd}"


@each("custom_eval_rollout_log_function")
def test_an_evaluation_log_function_says_whether_it_replaces_the_default(world, path):
    samples = samples_of(world)
    rewards = [0.0 if isinstance(s.reward, dict) else s.reward for s in samples]
    one = {"rewards": rewards, "truncated": [False] * len(samples), "samples": samples}
    metrics = {"eval/held_out/reward": 0.5}
    hook = world.bound("custom_eval_rollout_log_function", path)
    skips = world.call(hook, 4, {"held_out": one}, metrics)
    assert isinstance(skips, bool)
    odd = {name: value for name, value in metrics.items() if not isinstance(value, Real)}
    assert not odd, f"metrics that are no numbers: {odd}"


@each("custom_reward_post_process")
def test_a_reward_post_process_gives_two_finite_numbers_per_sample(world, path):
    samples = samples_of(world)
    before = frozen([samples])
    raw, rewards = world.call(world.bound("custom_reward_post_process", path), samples)
    assert len(raw) == len(rewards) == len(samples)
    assert all(map(math.isfinite, [*raw, *rewards]))
    assert changed(before, [samples]) <= {"metadata", "train_metadata", "remove_sample"}


@each("custom_convert_samples_to_train_data")
def test_a_conversion_gives_columns_that_fit_together(world, path):
    hook = world.bound("custom_convert_samples_to_train_data", path)
    data = world.call(hook, samples_of(world))
    for name in ("tokens", "response_lengths", "rewards", "loss_masks"):
        assert name in data, f"no {name}"
    lengths = {name: len(column) for name, column in data.items()}
    assert len(set(lengths.values())) == 1, f"columns of several lengths: {lengths}"
    columns = (data["tokens"], data["response_lengths"], data["loss_masks"])
    for tokens, length, mask in zip(*columns, strict=True):
        assert 0 < length < len(tokens), f"{length} response tokens of {len(tokens)}"
        assert len(mask) == length, f"a mask of {len(mask)} for {length} response tokens"


@each("custom_convert_samples_to_train_data")
def test_what_a_conversion_gives_can_be_trained_on_and_loses_nothing(world, path):
    hook = world.bound("custom_convert_samples_to_train_data", path)
    samples, given = samples_of(world), {}

    def convert(flat):
        given.update(world.call(hook, flat))
        return given

    rows = rows_from_samples(samples, convert=convert)
    assert rows and sum(sum(row.loss_mask) for row in rows) > 0, "no token is trained on"
    seen = columns_of(rows)
    renamed = {"metadata", "train_metadata", "rollout_log_probs"}
    lost = {name for name in given if name not in seen} - renamed
    assert not lost, f"columns that do not reach the loss: {sorted(lost)}"


@each("rollout_data_postprocess")
def test_a_data_postprocess_keeps_the_data_in_shape(world, path):
    data, samples = training_data(world)
    names, num_rows = set(data), len(data["tokens"])
    world.call(world.bound("rollout_data_postprocess", path), 4, data, samples)
    assert names <= set(data), f"columns are gone: {sorted(names - set(data))}"
    assert len(data["tokens"]) == num_rows, "rows are gone"
    for name in ("loss_masks", "advantages", "returns", "log_probs"):
        lengths = [len(one) for one in data[name]]
        assert lengths == data["response_lengths"], f"{name} no longer fit the responses"
    assert all(bool(torch.isfinite(one).all()) for one in data["advantages"])


@each("custom_advantage_function")
def test_advantages_and_returns_are_one_finite_number_per_token(world, path):
    data, _ = training_data(world)
    del data["advantages"], data["returns"]
    world.call(world.bound("custom_advantage_function", path), data)
    for name in ("advantages", "returns"):
        assert name in data, f"{name} were not set"
        assert [len(one) for one in data[name]] == data["response_lengths"]
        assert all(bool(torch.isfinite(one).all()) for one in data[name])


def correction_call(world):
    data, _ = training_data(world)
    lengths = data["response_lengths"]
    return CorrectionCall(
        pg_loss=torch.ones(sum(lengths), requires_grad=True),
        train_log_probs=data["log_probs"],
        rollout_log_probs=data["rollout_log_probs"],
        loss_masks=data["loss_masks"],
        total_lengths=data["total_lengths"],
        response_lengths=lengths,
        args=world.args,
    )


@each("custom_tis_function")
def test_a_correction_gives_loss_masks_and_metrics_in_shape(world, path):
    world.args.learn(use_tis=True)
    call = correction_call(world)
    loss, masks, metrics = world.call(world.bound("custom_tis_function", path), call)
    assert loss.shape == call.pg_loss.shape
    assert loss.requires_grad, "the gradient of the policy loss is lost"
    assert [len(mask) for mask in masks] == call.response_lengths
    assert isinstance(metrics, dict)
    assert bool(torch.isfinite(loss).all())


@pytest.mark.parametrize("per_token", [False, True])
@each("custom_pg_loss_reducer_function")
def test_a_reducer_makes_a_scalar_and_keeps_masked_tokens_out(world, path, per_token):
    data, _ = training_data(world)
    lengths = data["response_lengths"]
    masks = [mask.clone() for mask in data["loss_masks"]]
    masks[0][:] = 0
    call = ReducerCall(data["total_lengths"], lengths, masks, per_token)
    reduce = world.call(world.bound("custom_pg_loss_reducer_function", path), call)
    values = torch.ones(sum(lengths), requires_grad=True)
    reduced = reduce(values)
    assert reduced.numel() == 1 and bool(torch.isfinite(reduced))
    (gradient,) = torch.autograd.grad(reduced, values)
    assert not gradient[: lengths[0]].any(), "tokens whose mask is 0 get a gradient"
    assert gradient.any(), "no token gets a gradient"


@each("custom_loss_function")
def test_a_loss_gives_a_scalar_with_gradient_and_metrics(world, path):
    data, samples = training_data(world)
    hook = world.bound("custom_loss_function", path)
    lengths = data["response_lengths"]
    if "native" in hook.form.families:
        given, leaves = native_loss_call(world, data, samples)
    else:
        given, leaves = family_loss_values(data, lengths)
    loss, metrics = world.call(hook, *given)
    assert loss.numel() == 1 and bool(torch.isfinite(loss))
    assert isinstance(metrics, dict)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert any(one is not None and bool(one.any()) for one in gradients), "no gradient"


def mean_by_sample(data):
    masks, lengths = data["loss_masks"], data["response_lengths"]

    def reduce(values):
        parts = torch.split(values, lengths) if isinstance(values, torch.Tensor) else values
        pairs = zip(parts, masks, strict=True)
        return sum((one * mask).sum() / mask.sum().clamp(min=1) for one, mask in pairs)

    return reduce


def native_loss_call(world, data, samples):
    leaves = [one.clone().requires_grad_() for one in data["log_probs"]]
    call = LossCall(
        logprobs=leaves,
        old_logprobs=data["log_probs"],
        rollout_logprobs=data["rollout_log_probs"],
        entropy=[torch.ones_like(one) for one in leaves],
        advantages=data["advantages"],
        loss_masks=data["loss_masks"],
        rewards=data["rewards"],
        metadata=[sample.metadata for sample in samples],
        train_metadata=[sample.train_metadata for sample in samples],
        data=data,
        args=world.args,
        reduce=mean_by_sample(data),
    )
    return (call,), leaves


def family_loss_values(data, lengths):
    vocabulary = 2 + max(int(tokens.max()) for tokens in data["tokens"])
    logits = torch.zeros(1, sum(data["total_lengths"]), vocabulary).normal_().requires_grad_()
    batch = {**data, "unconcat_tokens": data["tokens"]}
    return (batch, logits, mean_by_sample(data)), [logits]


if __name__ == "__main__":
    sys.exit(run_as_script(__file__, SLOTS))
