"""Hooks that see a whole rollout before its first step: advantages and postprocessing."""

import dataclasses

import pytest
import torch

from dovetail.batch.convert import rows_from_samples
from dovetail.trainers.hooks import TrainHooks
from dovetail.types import HookRunError, Sample
from tests.unit.trainers.tiny import furthest, gradient_of, make_model, make_rows, make_trainer

MODEL, REFERENCE = make_model(seed=1), make_model(seed=2)


def scaled(gradient, factor):
    return {name: factor * grad for name, grad in gradient.items()}


def grpo_by_hand(data):
    """Group-normalised rewards, written as a plugin of the slime family would."""
    rewards = torch.tensor(data["rewards"], dtype=torch.float64)
    groups = torch.tensor(data["group_indices"])
    advantages = torch.zeros_like(rewards)
    for group in groups.unique():
        own = rewards[groups == group]
        advantages[groups == group] = (own - own.mean()) / (own.std() + 1e-6)
    data["advantages"] = [
        torch.ones_like(logprobs) * float(a)
        for logprobs, a in zip(data["log_probs"], advantages, strict=True)
    ]
    data["returns"] = data["advantages"]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("steps", [10**6, 4])
def test_grpo_written_as_a_hook_trains_alike(whiten, steps):
    rows, algorithm = make_rows(1), {"normalize_advantages": whiten}
    settings = {"algorithm": algorithm, "samples_per_optimizer_step": steps}
    settings["optimizer"] = {"lr": 1e-3}
    built_in = make_trainer(make_model(), **settings)
    own = make_trainer(make_model(), hooks=TrainHooks(advantage=grpo_by_hand), **settings)
    first, second = built_in.train(rows), own.train(rows)
    assert first["train/loss"] == pytest.approx(second["train/loss"], rel=1e-3, abs=1e-5)
    for a, b in zip(built_in.logprobs(rows), own.logprobs(rows), strict=True):
        assert a == pytest.approx(b, abs=2e-3)


def test_grpo_written_as_a_hook_has_the_same_gradient():
    rows = make_rows(2)
    hooks = TrainHooks(advantage=grpo_by_hand)
    assert furthest(gradient_of(MODEL, rows), gradient_of(MODEL, rows, hooks=hooks)) < 1e-6


def test_advantages_may_differ_from_token_to_token():
    # Only the first trained token has an advantage: as if the others were masked, with the divisor
    # of all of them.
    rows = make_rows(3, mask=1.0)

    def first_only(data):
        data["advantages"] = [
            [float(r)] + [0.0] * (n - 1)
            for r, n in zip(data["rewards"], data["response_lengths"], strict=True)
        ]

    masked = [
        dataclasses.replace(
            row,
            loss_mask=[1] + [0] * (row.response_length - 1),
            mask_sum=row.response_length,
        )
        for row in rows
    ]
    plain = gradient_of(MODEL, masked, algorithm={"rewards_normalization": False})
    got = gradient_of(MODEL, rows, hooks=TrainHooks(advantage=first_only))
    assert furthest(plain, got) < 1e-6


def test_an_advantage_hook_sees_what_the_family_shows_it():
    seen = {}

    def look(data):
        seen.update(data)
        grpo_by_hand(data)

    rows = [
        dataclasses.replace(
            r, extra={"turns": r.index}, rollout_logprobs=[-1.0] * r.response_length
        )
        for r in make_rows(4)
    ]
    settings = {"algorithm": {"kl_coef": 0.1, "kl_loss_type": "k1"}, "optimizer": {"lr": 0.0}}
    trainer = make_trainer(make_model(), REFERENCE, hooks=TrainHooks(advantage=look), **settings)
    trainer.train(rows)
    known = trainer.logprobs(rows)
    for i, row in enumerate(rows):
        assert seen["tokens"][i].tolist() == row.tokens and seen["loss_masks"][i].ndim == 1
        assert seen["log_probs"][i].tolist() == pytest.approx(known[i], abs=1e-5)
        gap = seen["log_probs"][i] - seen["ref_log_probs"][i]
        torch.testing.assert_close(seen["kl"][i], gap)
    assert seen["turns"] == [row.index for row in rows]
    assert seen["rollout_mask_sums"] == [sum(row.loss_mask) for row in rows]
    assert seen["rollout_ids"] == list(range(len(rows)))
    assert {"rewards", "raw_reward", "total_lengths", "sample_indices", "metadata"} <= set(seen)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda data: None, 'set no data."advantages".'),
        (lambda data: [1.0], "advantages has 1 entries, expected 12"),
        (lambda data: [torch.zeros(99)] * 12, r"sample 0: advantages has the shape \[99\]"),
        (lambda data: ["a"] * 12, "sample 0: advantages is 'a'"),
        (lambda data: [float("nan")] * 12, "sample 0: advantages has a value that is not finite"),
    ],
)
def test_wrong_advantages_are_named(made, message):
    trainer = make_trainer(MODEL, hooks=TrainHooks(advantage=made))
    with pytest.raises(HookRunError, match=rf"--custom-advantage-function-path.*{message}"):
        trainer.train(make_rows(5))


def test_postprocessed_advantages_are_trained_on():
    def double(rollout_id, data, samples):
        assert rollout_id == 0 and samples == []
        data["advantages"] = [2 * a for a in data["advantages"]]

    rows = make_rows(6)
    got = gradient_of(MODEL, rows, hooks=TrainHooks(postprocess=double))
    assert furthest(scaled(gradient_of(MODEL, rows), 2), got) < 1e-6


def test_postprocessing_in_place_counts_as_well():
    def halve(rollout_id, data, samples):
        for advantages, mask in zip(data["advantages"], data["loss_masks"], strict=True):
            advantages.mul_(0.5)
            mask[1:] = 0

    rows = make_rows(7)
    short = [
        dataclasses.replace(r, loss_mask=[*r.loss_mask[:1], *[0] * (r.response_length - 1)])
        for r in rows
    ]
    got = gradient_of(MODEL, rows, hooks=TrainHooks(postprocess=halve))
    assert furthest(scaled(gradient_of(MODEL, short), 0.5), got) < 1e-6


def test_postprocessed_old_logprobs_change_the_ratio():
    def lower(rollout_id, data, samples):
        data["log_probs"] = [own - 0.1 for own in data["log_probs"]]

    rows = make_rows(8)
    got = gradient_of(MODEL, rows, hooks=TrainHooks(postprocess=lower))
    factor = float(torch.tensor(0.1).exp())
    assert furthest(scaled(gradient_of(MODEL, rows), factor), got) < 3e-6


def test_divisors_that_a_hook_sets_are_kept():
    def ten(rollout_id, data, samples):
        data["rollout_mask_sums"] = [10] * len(data["tokens"])

    rows = make_rows(9)
    tens = [dataclasses.replace(row, mask_sum=10) for row in rows]
    got = gradient_of(MODEL, rows, hooks=TrainHooks(postprocess=ten))
    assert furthest(gradient_of(MODEL, tens), got) < 1e-6


def make_samples(rows):
    return [
        Sample(
            index=row.index,
            group_index=row.group_index,
            tokens=row.tokens,
            response_length=row.response_length,
            loss_mask=list(row.loss_mask),
            reward=row.reward,
        )
        for row in rows
    ]


def test_what_a_hook_does_to_samples_takes_effect_too():
    rows = make_rows(10, mask=1.0)

    def edit(rollout_id, data, samples):
        samples[0].remove_sample = True
        samples[1].loss_mask = [0] * (samples[1].response_length - 1) + [1]
        samples[2].metadata["note"] = "seen"

    expected = list(rows)
    expected[0] = dataclasses.replace(rows[0], loss_mask=[0] * rows[0].response_length)
    expected[1] = dataclasses.replace(rows[1], loss_mask=[0] * (rows[1].response_length - 1) + [1])
    hooks = TrainHooks(postprocess=edit)
    got = gradient_of(MODEL, rows_from_samples(make_samples(rows)), hooks=hooks)
    assert furthest(gradient_of(MODEL, expected), got) < 1e-6


def test_what_a_postprocess_adds_reaches_the_loss():
    seen = []

    def add(rollout_id, data, samples):
        data["weights"] = [float(n) for n in data["response_lengths"]]
        data["whole"] = "of the rollout"
        data["metadata"] = [{"n": n} for n in data["response_lengths"]]

    def loss(call):
        seen.extend(call.data["weights"])
        assert call.data["whole"] == "of the rollout"
        assert [one["n"] for one in call.metadata] == [len(part) for part in call.logprobs]
        return call.reduce(call.logprobs), {}

    rows = make_rows(11)
    hooks = TrainHooks(postprocess=add, loss=loss)
    batch = {"micro_batch_size": 2}
    make_trainer(MODEL, algorithm={"loss_type": "custom_loss"}, hooks=hooks, batch=batch).train(
        rows
    )
    assert sorted(seen) == sorted(float(row.response_length) for row in rows)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(advantages=d["advantages"][1:]), "advantages has 11 entries"),
        (lambda d: d["loss_masks"].__setitem__(3, [1] * 99), "sample 3: loss_mask has 99 entries"),
        (lambda d: d["loss_masks"][0].fill_(2), "sample 0: loss_masks has 2, expected 0 or 1"),
        (lambda d: d["tokens"].__setitem__(1, [1]), "sample 1: tokens has 1 entries"),
        (lambda d: d.update(rewards=3.0), "rewards is a float, expected a list"),
    ],
)
def test_an_edit_that_does_not_fit_is_named(edit, message):
    hooks = TrainHooks(postprocess=lambda rollout_id, data, samples: edit(data))
    with pytest.raises(HookRunError, match=rf"--rollout-data-postprocess-path.*{message}"):
        make_trainer(MODEL, hooks=hooks).train(make_rows(12))


def test_a_fault_before_the_first_step_leaves_everything_as_it_was():
    calls = []

    def fails(call):
        calls.append(call)
        if len(calls) == 3:
            raise HookRunError("mine")
        return call.reduce(call.logprobs), {}

    model, rows = make_model(), make_rows(13)
    before = [param.detach().clone() for param in model.parameters()]
    settings = {"algorithm": {"loss_type": "custom_loss"}, "batch": {"micro_batch_size": 3}}
    trainer = make_trainer(model, hooks=TrainHooks(loss=fails), **settings)
    with pytest.raises(HookRunError, match="mine"):
        trainer.train(rows)
    assert not trainer.changed and not trainer.backend.optimizer.main_grads
    assert all(map(torch.equal, before, model.parameters()))
    trainer.train(rows)
    assert trainer.changed
    clean = make_model()
    make_trainer(
        clean, hooks=TrainHooks(loss=lambda call: call.reduce(call.logprobs)), **settings
    ).train(rows)
    assert all(map(torch.equal, clean.parameters(), model.parameters()))


def test_a_fault_after_a_step_is_told():
    calls = []

    def fails(call):
        calls.append(call)
        if len(calls) > 1:
            raise HookRunError("mine")
        return call.reduce(call.logprobs)

    trainer = make_trainer(
        make_model(),
        algorithm={"loss_type": "custom_loss"},
        hooks=TrainHooks(loss=fails),
        samples_per_optimizer_step=4,
    )
    with pytest.raises(HookRunError):
        trainer.train(make_rows(14))
    assert trainer.changed


@pytest.mark.parametrize("mask", [1, [2, 2], ["a", "b"], [1]])
def test_a_mask_left_on_a_sample_that_is_none_is_named(mask):
    samples = [
        Sample(index=i, group_index=0, tokens=[5, 6, 7], response_length=2, reward=float(i))
        for i in range(2)
    ]

    def mark(rollout_id, data, samples):
        samples[1].loss_mask = mask

    trainer = make_trainer(MODEL, hooks=TrainHooks(postprocess=mark), optimizer={"lr": 0.0})
    with pytest.raises(
        HookRunError, match=r"--rollout-data-postprocess-path .*sample 1: loss_mask"
    ):
        trainer.train(rows_from_samples(samples))


def test_a_mask_left_on_a_sample_may_be_a_tensor():
    samples = [
        Sample(index=i, group_index=0, tokens=[5, 6, 7], response_length=2, reward=float(i))
        for i in range(2)
    ]

    def mark(rollout_id, data, samples):
        for sample in samples:
            sample.loss_mask = torch.tensor([1, 0])

    trainer = make_trainer(MODEL, hooks=TrainHooks(postprocess=mark), optimizer={"lr": 0.0})
    assert trainer.train(rows_from_samples(samples))["train/tokens"] == 2


def test_supervised_rows_are_postprocessed_too():
    seen = {}

    def first_only(rollout_id, data, samples):
        seen.update(data)
        for mask in data["loss_masks"]:
            mask[1:] = 0

    rows, algorithm = make_rows(15), {"loss_type": "sft_loss"}
    short = [
        dataclasses.replace(r, loss_mask=[*r.loss_mask[:1], *[0] * (r.response_length - 1)])
        for r in rows
    ]
    hooks = TrainHooks(postprocess=first_only)
    got = gradient_of(MODEL, rows, algorithm=algorithm, hooks=hooks)
    assert furthest(gradient_of(MODEL, short, algorithm=algorithm), got) < 1e-6
    assert not {"advantages", "log_probs", "kl"} & set(seen)


def test_a_run_without_hooks_scores_and_trains_on_trained_tokens_only():
    # What hooks cost is paid by runs that have them: the same passes over the same tokens.
    rows = make_rows(16, mask=0.3)
    trainer = make_trainer(MODEL, samples_per_optimizer_step=4, optimizer={"lr": 0.0})
    scored = []
    real = trainer.backend.logprobs

    def logprobs(batches, *more, **how):
        for batch in batches:
            scored.append(batch)
            yield from real([batch], *more, **how)

    trainer.backend.logprobs = logprobs
    trainer.backend._per_batch = None
    trainer.train(rows)
    assert sum(len(batch.targets_N) for batch in scored) == sum(sum(r.loss_mask) for r in rows[4:])
