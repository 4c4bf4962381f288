"""Logprobs and gradients equal those of the plain model, for every architecture and layout."""

import copy

import pytest
import torch

from tests.unit.trainers.tiny import (
    ARCHITECTURES,
    furthest,
    gradient_of,
    make_model,
    make_rows,
    make_trainer,
)


def plain_logprobs(model, row, temperature=1.0):
    logits = model(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0].float()
    every = torch.log_softmax(logits / temperature, -1)
    at = torch.arange(row.prompt_length - 1, len(row.tokens) - 1)
    return every[at, torch.tensor(row.tokens)[at + 1]]


def plain_gradient(model, rows, advantages):
    model = copy.deepcopy(model)
    loss = 0.0
    for row, advantage in zip(rows, advantages, strict=True):
        mask = torch.tensor(row.loss_mask, dtype=torch.float32)
        if mask.sum():
            logprobs = plain_logprobs(model, row)
            ratio = (logprobs - logprobs.detach()).exp()
            loss = loss - advantage * (ratio * mask).sum() / mask.sum() / len(rows)
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_equal_the_plain_forward(name):
    model = make_model(name)
    # Gemma 2 and Mistral also run beyond their sliding window of 16.
    rows = make_rows(prompt=(4, 9), response=(0, 14))
    got = make_trainer(model, temperature=0.7).logprobs(rows)
    with torch.no_grad():
        for row, logprobs in zip(rows, got, strict=True):
            expected = plain_logprobs(model, row, 0.7)
            torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("share", [True, False])
def test_the_gradient_equals_that_of_the_plain_forward(name, share):
    model = make_model(name)
    rows = make_rows(response=(1, 6))
    centred = {"grpo_std_normalization": False}
    got = gradient_of(model, rows, share=share, algorithm=centred, batch={"max_tokens_per_gpu": 48})
    means = [sum(r.reward for r in rows if r.group_index == g) / 4 for g in range(3)]
    expected = plain_gradient(model, rows, [r.reward - means[r.group_index] for r in rows])
    assert furthest(expected, got) < 1e-5


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "Gemma2"])
def test_packed_lines_are_taken_where_attention_can_be_replaced(name):
    policy = make_trainer(make_model(name)).backend.policy
    assert policy.packs, policy.pack_reason
    assert policy.head is not None, policy.head_reason


def test_capped_attention_falls_back_to_padding_and_says_why():
    policy = make_trainer(make_model("Gemma2")).backend.policy
    assert not policy.packs and "softcap" in policy.pack_reason
    assert policy.head.softcap == 3.0


def test_sequences_beyond_a_sliding_window_are_padded():
    backend = make_trainer(make_model("Mistral")).backend
    short, long = make_rows(prompt=(2, 3), response=(4, 5)), make_rows(response=(15, 20))
    assert all(plan.packed for plan in backend.plan(short, range(12)))
    assert not any(plan.packed for plan in backend.plan(long, range(12)))


def test_an_unknown_head_uses_the_models_own_logits():
    model = make_model("Llama")
    rows = make_rows()
    real = model.forward

    def shifted(*args, **kwargs):
        output = real(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 3, output.logits.shape[-1])
        return output

    model.forward = shifted
    trainer = make_trainer(model)
    assert trainer.backend.policy.head is None
    assert "changed in a way" in trainer.backend.policy.head_reason
    with torch.no_grad():
        for row, logprobs in zip(rows, trainer.logprobs(rows), strict=True):
            torch.testing.assert_close(
                torch.tensor(logprobs), plain_logprobs(model, row), rtol=0, atol=1e-5
            )
    before = model.lm_head.weight.detach().clone()
    assert trainer.train(rows)["train/entropy"] > 0
    assert not torch.equal(before, model.lm_head.weight)


def test_gradient_checkpointing_gives_the_same_gradient():
    model = make_model()
    rows = make_rows()
    expected = gradient_of(model, rows)
    model.activation_checkpointing_enable()
    assert furthest(expected, gradient_of(model, rows)) < 1e-6


def test_dropout_is_off_so_that_logprobs_are_the_rollouts():
    model = make_model("Llama", attention_dropout=0.5)
    model.train()
    rows = make_rows()
    metrics = make_trainer(model, optimizer={"lr": 0.0}).train(rows)
    again = make_trainer(model, optimizer={"lr": 0.0}).train(rows)
    assert metrics == again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_setting_of_the_model_is_left_as_it_was(dtype):
    model = make_model(dtype=dtype)
    before = model.config._attn_implementation
    trainer = make_trainer(model)
    assert trainer.backend.policy.packs
    trainer.train(make_rows())
    assert model.config._attn_implementation == before
