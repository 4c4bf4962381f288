"""The draw follows the distribution, and depends on (seed, position) alone."""

import numpy as np
import pytest
import torch

from dovetail.engines.embedded.sampling import build_row_sampling, sample, uniforms
from dovetail.types.calls import SamplingParams

CPU = torch.device("cpu")
DRAWS = 20000


def draw(logits, params, seeds, position=0, banned=()):
    n = len(seeds)
    rows = build_row_sampling([params] * n, seeds, [position] * n, [banned] * n, CPU)
    return sample(torch.tensor(logits).float().repeat(n, 1), rows)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    kept = expected > 0
    assert not counts[~kept].any(), "a token outside the cut was drawn"
    return float((((counts - expected) ** 2)[kept] / expected[kept]).sum()), int(kept.sum()) - 1


def cut(probabilities, top_k=-1, top_p=1.0, min_p=0.0):
    """The definition, one token at a time."""
    order = np.argsort(-probabilities, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    kept, held, total = [], 0.0, probabilities[order].sum()
    for i in order:
        if held < top_p * total and probabilities[i] >= min_p * probabilities[order[0]]:
            kept.append(i)
        held += probabilities[i]
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept]
    return result / result.sum()


@pytest.mark.parametrize("vocab", [5, 64, 130])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"top_k": 4, "top_p": 0.6, "min_p": 0.1, "temperature": 1.7},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution_after_its_cuts(vocab, settings):
    logits = np.random.default_rng(vocab).normal(size=vocab)
    params = SamplingParams(**settings)
    tokens, logprobs = draw(logits, params, list(range(DRAWS)))
    scaled = logits / params.temperature
    full = np.exp(scaled) / np.exp(scaled).sum()
    wanted = cut(full, params.top_k, params.top_p, params.min_p)
    statistic, freedom = chi_square(np.bincount(tokens.numpy(), minlength=vocab), wanted)
    assert statistic < freedom + 5 * (2 * max(freedom, 1)) ** 0.5
    np.testing.assert_allclose(logprobs.numpy(), np.log(full)[tokens.numpy()], atol=1e-5)


def test_a_nucleus_wider_than_the_first_guess_is_still_exact():
    logits = np.zeros(2000)
    logits[7] = 3.0
    tokens, _ = draw(logits, SamplingParams(top_p=0.9), list(range(5000)))
    assert len(set(tokens.tolist())) > 1200


def test_greedy_takes_the_maximum_and_reports_logprobs_at_temperature_one():
    logits = [1.0, 4.0, 2.0]
    tokens, logprobs = draw(logits, SamplingParams(temperature=0.0), [1, 2])
    assert tokens.tolist() == [1, 1]
    assert logprobs[0].item() == pytest.approx(torch.tensor(logits).log_softmax(0)[1].item())


def test_banned_tokens_are_never_drawn_and_do_not_change_logprobs():
    logits = [5.0, 1.0, 0.0]
    tokens, logprobs = draw(logits, SamplingParams(), list(range(500)), banned=(0,))
    assert set(tokens.tolist()) == {1, 2}
    wanted = torch.tensor(logits).log_softmax(0)[tokens]
    torch.testing.assert_close(logprobs, wanted)
    greedy, _ = draw(logits, SamplingParams(temperature=0.0), [0], banned=(0,))
    assert greedy.tolist() == [1]


def test_the_draw_depends_on_seed_and_position_not_on_the_batch():
    logits = torch.randn(6, 90, generator=torch.Generator().manual_seed(0))
    every = [
        SamplingParams(),
        SamplingParams(top_k=5),
        SamplingParams(temperature=0.0),
        SamplingParams(top_p=0.5),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=2.0),
    ]
    seeds, positions = [3, 1, 4, 1, 5, 2**63 + 9], [0, 7, 2, 7, 1, 0]

    def run(rows):
        state = build_row_sampling(
            [every[i] for i in rows],
            [seeds[i] for i in rows],
            [positions[i] for i in rows],
            [()] * len(rows),
            CPU,
        )
        return sample(logits[rows].clone(), state)

    together, logprobs = run([0, 1, 2, 3, 4, 5])
    for i in range(6):
        token, logprob = run([i])
        assert (token.item(), logprob.item()) == (together[i].item(), logprobs[i].item())


def test_uniforms_are_uniform_over_seeds_and_over_positions():
    count = 200000
    ramp, zeros = np.arange(count, dtype=np.uint64), np.zeros(count, dtype=np.uint64)
    for seeds, positions in ((ramp, zeros), (zeros, ramp)):
        u = uniforms(seeds, positions)
        assert u.min() >= 0 and u.max() < 1
        histogram = np.bincount((u * 100).astype(int), minlength=100)
        assert ((histogram - count / 100) ** 2 / (count / 100)).sum() < 99 + 5 * 198**0.5
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
