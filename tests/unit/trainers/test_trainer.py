"""What one call of the trainer does to weights, state and metrics."""

import dataclasses
import math

import pytest
import torch

from dovetail.types import CheckpointError, ConfigError, TrainError
from tests.unit.trainers.tiny import make_model, make_rows, make_trainer


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def state_of(trainer):
    tensors, facts = trainer.state_dict()
    return {name: tensor.clone() for name, tensor in tensors.items()}, dict(facts)


def with_rewards(rows, reward):
    return [dataclasses.replace(r, reward=reward(r)) for r in rows]


def with_bomb(model):
    """Makes gradients of the last norm non-finite while `bomb.on`."""

    class Bomb:
        on = False

    def spoil(grad):
        return grad * torch.nan if Bomb.on else grad

    model.model.norm.weight.register_hook(spoil)
    return Bomb


RESUMED = {
    "algorithm": {"use_kl_loss": True, "kl_loss_coef": 0.1},
    "optimizer": {"lr": 1e-2, "lr_decay_style": "cosine", "lr_warmup_iters": 2},
    "batch": {"max_tokens_per_gpu": 64},
    "total_optimizer_steps": 12,
    "samples_per_optimizer_step": 6,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_trainer_goes_on_bit_equal(dtype):
    def fresh(seed):
        return make_trainer(make_model(dtype=dtype, seed=seed), make_model(dtype=dtype), **RESUMED)

    straight = fresh(0)
    for step in range(2):
        straight.train(make_rows(step))
    saved = state_of(straight)
    resumed = fresh(7)
    resumed.load_state_dict(*saved)
    for step in range(2, 4):
        assert straight.train(make_rows(step)) == resumed.train(make_rows(step))
    for a, b in zip(state_of(straight)[0].values(), state_of(resumed)[0].values(), strict=True):
        assert torch.equal(a, b)
    assert equal(weights(straight.backend.policy.model), weights(resumed.backend.policy.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_loading_write_into_the_same_memory(dtype):
    model = make_model(dtype=dtype)
    trainer = make_trainer(model)
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = weights(model)
    saved = state_of(trainer)
    trainer.train(make_rows())
    assert not equal(before, weights(model))
    trainer.load_state_dict(*saved)
    assert equal(before, weights(model))
    assert where == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_bfloat16_weights_are_their_masters_rounded():
    model = make_model(dtype=torch.bfloat16)
    trainer = make_trainer(model, optimizer={"lr": 1e-5})
    for step in range(3):
        trainer.train(make_rows(step))
    masters = trainer.backend.optimizer.masters
    for name, param in model.named_parameters():
        assert masters[name].dtype == torch.float32
        assert torch.equal(masters[name].bfloat16(), param)
    # Updates below a bfloat16 step live on in the master.
    assert any(not torch.equal(masters[n], p.float()) for n, p in model.named_parameters())


def test_better_answers_become_likelier():
    model = make_model()
    trainer = make_trainer(model, optimizer={"lr": 1e-3})
    rows = with_rewards(make_rows(mask=1.0), lambda r: float(r.index % 2))
    before = [sum(x) for x in trainer.logprobs(rows)]
    for _ in range(5):
        trainer.train(rows)
    after = [sum(x) for x in trainer.logprobs(rows)]
    gains = [a - b for a, b in zip(after, before, strict=True)]
    assert min(gains[1::2]) > 0 > max(gains[0::2])


def test_sft_lowers_its_cross_entropy_and_needs_no_group():
    rows = [dataclasses.replace(r, group_index=None) for r in make_rows()]
    trainer = make_trainer(make_model(), algorithm={"loss_type": "sft_loss"})
    losses = [trainer.train(rows)["train/loss"] for _ in range(12)]
    assert losses[-1] < losses[0] / 2


def test_metrics_have_the_numbers_of_the_step():
    rows = [dataclasses.replace(r, loss_mask=[1] * r.response_length) for r in make_rows()]
    trainer = make_trainer(make_model(), optimizer={"lr": 0.0})
    known = trainer.logprobs(rows)
    rows[:6] = [
        dataclasses.replace(r, rollout_logprobs=[x + 0.5 for x in lp])
        for r, lp in zip(rows[:6], known[:6], strict=True)
    ]
    got = trainer.train(rows)
    assert got["train/rollout_logprob_abs_diff"] == pytest.approx(0.5, abs=1e-4)
    # log(train / rollout) = -0.5: e^-0.5 - 1 + 0.5
    assert got["train/rollout_kl"] == pytest.approx(math.exp(-0.5) - 0.5, abs=1e-4)
    assert got["train/ratio_mean"] == pytest.approx(1.0)
    assert got["train/clip_frac"] == 0.0
    assert got["train/tokens"] == sum(r.response_length for r in rows)
    assert got["train/model_tokens"] < sum(len(r.tokens) for r in rows)
    assert got["train/optimizer_steps"] == 1.0 and got["train/skipped_steps"] == 0.0
    assert {"train/loss", "train/pg_loss", "train/entropy", "train/grad_norm", "train/lr"} <= set(
        got
    )


def test_without_rollout_logprobs_there_is_no_comparison():
    got = make_trainer(make_model()).train(make_rows())
    assert not [name for name in got if "rollout" in name]


def test_kl_of_the_policy_to_itself_is_zero_and_grows_with_training():
    trainer = make_trainer(
        make_model(), make_model(), algorithm={"use_kl_loss": True, "kl_loss_type": "k3"}
    )
    first, second = (trainer.train(make_rows())["train/kl"] for _ in range(2))
    assert first == pytest.approx(0.0, abs=1e-6)
    assert second > 1e-4


def test_kl_in_the_reward_lowers_the_advantage_of_drifted_samples():
    policy, reference = make_model(seed=1), make_model(seed=2)
    rows = with_rewards(make_rows(mask=1.0), lambda r: 0.0)
    trainer = make_trainer(
        policy, reference, algorithm={"kl_coef": 0.5, "grpo_std_normalization": False}
    )
    ours, theirs = trainer.logprobs(rows), make_trainer(reference).logprobs(rows)
    penalised = [-0.5 * (sum(a) - sum(b)) for a, b in zip(ours, theirs, strict=True)]
    means = [sum(penalised[4 * g : 4 * g + 4]) / 4 for g in range(3)]
    seen = []
    real = trainer.loss
    trainer.loss = lambda inputs, config: (seen.append(inputs), real(inputs, config))[1]
    trainer.train(rows)
    got = sorted({round(float(x), 4) for inputs in seen for x in inputs.advantages_N})
    expected = sorted({round(p - means[i // 4], 4) for i, p in enumerate(penalised)})
    assert got == pytest.approx(expected, abs=2e-3)


def test_later_steps_of_a_rollout_are_clipped_against_its_start():
    trainer = make_trainer(
        make_model(), samples_per_optimizer_step=4, optimizer={"lr": 5e-2}, algorithm={}
    )
    seen = []
    real = trainer.loss
    trainer.loss = lambda inputs, config: (seen.append(inputs), real(inputs, config))[1]
    got = trainer.train(make_rows())
    assert got["train/optimizer_steps"] == 3
    ratios = [float((i.logprobs_N.detach() - i.old_logprobs_N).abs().max()) for i in seen]
    assert ratios[0] == 0.0 and min(ratios[1:]) > 0.01


def test_a_non_finite_gradient_changes_nothing_and_is_counted():
    model = make_model()
    trainer = make_trainer(model, optimizer={"lr": 1e-2, "lr_warmup_iters": 9})
    bomb = with_bomb(model)
    trainer.train(make_rows(1))
    before, (tensors, facts) = weights(model), state_of(trainer)
    bomb.on = True
    got = trainer.train(make_rows(2))
    assert got["train/skipped_steps"] == 1.0 and got["train/optimizer_steps"] == 0.0
    after_tensors, after_facts = state_of(trainer)
    assert equal(before, weights(model)) and equal(tensors, after_tensors)
    assert after_facts == {**facts, "nonfinite_streak": 1}
    bomb.on = False
    assert trainer.train(make_rows(3))["train/skipped_steps"] == 0.0
    assert state_of(trainer)[1]["nonfinite_streak"] == 0


def test_too_many_non_finite_gradients_in_a_row_stop_the_run():
    model = make_model()
    trainer = make_trainer(model, optimizer={"max_nonfinite_steps": 2})
    with_bomb(model).on = True
    trainer.train(make_rows())
    with pytest.raises(TrainError, match=r"2 optimizer steps in a row"):
        trainer.train(make_rows())


def test_removed_samples_give_no_gradient_but_count_in_the_mean():
    rows = make_rows(mask=1.0)
    muted = [
        dataclasses.replace(r, loss_mask=[0] * r.response_length) if r.index % 2 else r
        for r in rows
    ]
    model = make_model()
    got = make_trainer(model, optimizer={"lr": 0.0}).train(muted)
    assert got["train/tokens"] == sum(r.response_length for r in rows[::2])


def test_a_rollout_without_anything_to_train_takes_no_step():
    model = make_model()
    before = weights(model)
    rows = make_rows(mask=0.0)
    got = make_trainer(model).train(rows)
    assert got["train/optimizer_steps"] == 0 and equal(before, weights(model))


def test_progress_counts_rows_to_the_end():
    seen = []
    trainer = make_trainer(
        make_model(), batch={"micro_batch_size": 4}, report=lambda d, t: seen.append((d, t))
    )
    trainer.train(make_rows(mask=1.0))
    assert seen == [(4, 12), (8, 12), (12, 12), (12, 12)]


def test_frozen_weights_stay_and_are_not_saved():
    model = make_model("Llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.requires_grad_(False)
    before = weights(model)
    trainer = make_trainer(model)
    trainer.train(make_rows())
    assert torch.equal(before["lm_head.weight"], model.lm_head.weight)
    assert not torch.equal(before["model.norm.weight"], model.model.norm.weight)
    assert not [name for name in trainer.state_dict()[0] if "lm_head" in name]


def test_kl_without_a_reference_is_refused():
    with pytest.raises(ConfigError, match="--ref-load"):
        make_trainer(make_model(), algorithm={"use_kl_loss": True})


def test_a_decaying_schedule_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="--lr-decay-iters"):
        make_trainer(make_model(), optimizer={"lr_decay_style": "linear"})


@pytest.mark.parametrize("token", [-1, 70000])
def test_a_token_that_the_model_does_not_have_is_named(token):
    rows = make_rows(1)
    rows[2] = dataclasses.replace(rows[2], index=2, tokens=[*rows[2].tokens[:-1], token])
    with pytest.raises(TrainError, match=f"sample 2: token id {token} .*--hf-checkpoint"):
        make_trainer(make_model()).train(rows)


def test_a_sample_without_a_group_is_named():
    rows = [dataclasses.replace(r, group_index=None) for r in make_rows()]
    with pytest.raises(TrainError, match=r"position 0 .* group_index None"):
        make_trainer(make_model()).train(rows)


@pytest.mark.parametrize("spoil", ["missing", "shape"])
def test_a_state_of_another_model_is_refused_before_anything_changes(spoil):
    model = make_model()
    trainer = make_trainer(model)
    tensors, facts = state_of(trainer)
    if spoil == "missing":
        del tensors["master.model.norm.weight"]
    else:
        tensors["master.model.norm.weight"] = torch.zeros(3)
    before = weights(model)
    for name in tensors:
        tensors[name] = tensors[name] + 1
    with pytest.raises(CheckpointError, match=r"master\.model\.norm\.weight"):
        trainer.load_state_dict(tensors, facts)
    assert equal(before, weights(model))
