"""Every number here is worked out by hand from the formula in the docstring."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dovetail.algorithms import family_ppo as ppo

E = math.e


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(got: torch.Tensor, *wanted: float) -> None:
    torch.testing.assert_close(got.float(), t(*wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("k1", (1.0, -1.0)),
        ("k2", (0.5, 0.5)),
        ("k3", (1 / E, E - 2)),
        ("low_var_kl", (1 / E, E - 2)),
    ],
)
def test_kl_estimates(kind: str, wanted: tuple[float, float]) -> None:
    close(ppo.compute_approx_kl(t(-1.0, -2.0), t(-2.0, -1.0), kind), *wanted)


def test_an_importance_ratio_weighs_the_estimate_before_it_is_cut() -> None:
    ratio = t(2.0, 0.5)
    close(ppo.compute_approx_kl(t(-1.0, -2.0), t(-2.0, -1.0), "k1", ratio), 2.0, -0.5)
    # k3 of d = -4 is e^4 - 5 = 49.6, cut to 10; times 0.1 it is 4.96 and not cut.
    close(ppo.compute_approx_kl(t(-5.0), t(-1.0), "low_var_kl"), 10.0)
    close(ppo.compute_approx_kl(t(-5.0), t(-1.0), "low_var_kl", t(0.1)), (E**4 - 5) / 10)
    with pytest.raises(ValueError, match="k9"):
        ppo.compute_approx_kl(t(0.0), t(0.0), "k9")


def test_the_policy_loss_is_clipped_on_both_sides_and_twice_for_bad_tokens() -> None:
    ratio = t(1.5, 0.5, 1.5, 0.5, 1.0)
    advantages = t(1.0, 1.0, -1.0, -1.0, 2.0)
    loss, clipped = ppo.compute_policy_loss(-ratio.log(), advantages, 0.2, 0.3)
    close(loss, -1.3, -0.5, 1.5, 0.8, -2.0)
    close(clipped, 1.0, 0.0, 0.0, 1.0, 0.0)
    loss, _ = ppo.compute_policy_loss(-t(5.0).log(), t(-1.0), 0.2, 0.3, eps_clip_c=3.0)
    close(loss, 3.0)
    with pytest.raises(ValueError, match="more than 1"):
        ppo.compute_policy_loss(t(0.0), t(1.0), 0.2, 0.3, 0.5)


def test_cispo_clips_the_weight_and_keeps_the_gradient() -> None:
    log_probs = t(-1.0, -2.0).requires_grad_()
    ratio = t(2.0, 1.0)
    loss, clipped = ppo.compute_cispo_loss(-ratio.log(), log_probs, t(1.0, -3.0), 0.2, 0.5)
    close(loss.detach(), 1.5, -6.0)
    close(clipped, 1.0, 0.0)
    loss.sum().backward()
    assert log_probs.grad is not None
    close(log_probs.grad, -1.5, 3.0)


def test_gspo_spreads_the_mean_of_each_sequence_over_its_tokens() -> None:
    new, old = [t(-1.0, -2.0, -3.0), t(-1.0)], [t(-2.0, -4.0, -9.0), t(-0.5)]
    masks = [t(1.0, 1.0, 0.0), t(0.0)]
    close(ppo.compute_gspo_kl(new, old, new, masks), -1.5, -1.5, -1.5, 0.0)


def test_opsm_masks_bad_tokens_of_sequences_that_went_astray() -> None:
    new, old = [t(-2.0, -2.0), t(-1.0, -1.0)], [t(-1.0, -1.0), t(-1.0, -1.0)]
    advantages, masks = [t(-1.0, 1.0), t(-1.0, -1.0)], [t(1.0, 1.0), t(1.0, 1.0)]
    args = SimpleNamespace(opsm_delta=0.5)
    mask, share = ppo.compute_opsm_mask(args, new, old, advantages, masks)
    close(mask, 0.0, 1.0, 1.0, 1.0)
    assert float(share) == 0.5


def test_logprobs_and_entropy_of_logits_also_piece_by_piece() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0], [math.log(4.0), 0.0]])
    tokens = torch.tensor([1, 0, 1])
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    fifth = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    for chunk_size in (-1, 2):
        log_probs, entropy = ppo.calculate_log_probs_and_entropy(
            logits, tokens, None, with_entropy=True, chunk_size=chunk_size
        )
        close(log_probs, math.log(0.75), math.log(0.5), math.log(0.2))
        assert entropy is not None
        close(entropy, quarter, math.log(2.0), fifth)
    assert ppo.calculate_log_probs_and_entropy(logits, tokens)[1] is None
    close(ppo.compute_log_probs(logits[:1], tokens[:1], None), math.log(0.75))
    close(ppo.compute_entropy_from_logits(logits[:1], None), quarter)


def test_grpo_returns_are_the_reward_at_every_token() -> None:
    first, second = ppo.get_grpo_returns(t(2.0, -1.0), [t(0.0, 0.0), t(0.0)])
    close(first, 2.0, 2.0)
    close(second, -1.0)


def test_reinforce_plus_plus_discounts_from_the_last_trained_token() -> None:
    # kl_coef 0.5: rewards per token -0.5, -1.0 + 8, 0 (masked); gamma 0.5.
    (returns,) = ppo.get_reinforce_plus_plus_returns(
        t(8.0), [t(1.0, 2.0, 4.0)], [t(1.0, 1.0, 0.0)], [3], [5], 0.5, 0.5
    )
    close(returns, -0.5 + 0.5 * 7.0, 7.0, 0.0)
    (nothing,) = ppo.get_reinforce_plus_plus_returns(t(8.0), [t(1.0)], [t(0.0)], [1], [2], 0.5, 1.0)
    close(nothing, 0.0)


def test_the_baseline_variant_takes_the_penalty_at_each_token() -> None:
    (advantages,) = ppo.get_reinforce_plus_plus_baseline_advantages(
        t(2.0), [t(1.0, 4.0)], [t(1.0, 1.0)], 0.5
    )
    close(advantages, 1.5, 0.0)


def test_generalised_advantages_of_one_sample() -> None:
    # gamma 0.5, lambda 0.5: deltas 0 + 0.5*2 - 1 = 0, 4 - 2 = 2; advantages 0 + 0.25*2, 2.
    advantages, returns = ppo.get_advantages_and_returns(5, 2, t(1.0, 2.0), t(0.0, 4.0), 0.5, 0.5)
    close(advantages, 0.5, 2.0)
    close(returns, 1.5, 4.0)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_batch_of_unequal_lengths_is_what_each_sample_is_alone(chunked: bool) -> None:
    values, rewards = [t(1.0, 2.0), t(3.0)], [t(0.0, 4.0), t(1.0)]
    advantages, returns = ppo.get_advantages_and_returns_batch(
        [5, 4], [2, 1], values, rewards, 0.5, 0.5, chunked=chunked
    )
    close(advantages[0], 0.5, 2.0)
    close(returns[0], 1.5, 4.0)
    close(advantages[1], -2.0)
    close(returns[1], 1.0)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 11])
def test_chunks_give_what_the_recurrence_gives(length: int) -> None:
    draw = torch.Generator().manual_seed(length)
    rewards = torch.randn(3, length, generator=draw, dtype=torch.float64)
    values = torch.randn(3, length, generator=draw, dtype=torch.float64)
    for gamma, lambd in ((0.9, 0.8), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)):
        one = ppo.chunked_gae(rewards, values, gamma, lambd, chunk_size=4)
        other = ppo.vanilla_gae(rewards, values, gamma, lambd)
        for got, wanted in zip(one, other, strict=True):
            torch.testing.assert_close(got, wanted)
