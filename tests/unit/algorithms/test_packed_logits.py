"""Logits of whole sequences, as losses of the slime family take them apart."""

import pytest
import torch

from dovetail.algorithms.packed_logits import (
    get_log_probs_and_entropy,
    get_responses,
    get_sum_of_sample_mean,
)

TOTALS, RESPONSES = [4, 3, 2], [2, 1, 0]


class Args:
    rollout_temperature = 2.0


def make():
    torch.manual_seed(0)
    tokens = [torch.randint(0, 5, (n,)) for n in TOTALS]
    return torch.randn(1, sum(TOTALS), 5, requires_grad=True), tokens


def settings(tokens):
    return {
        "args": Args,
        "unconcat_tokens": tokens,
        "total_lengths": TOTALS,
        "response_lengths": RESPONSES,
    }


def test_a_response_is_predicted_one_position_before():
    logits, tokens = make()
    found = list(get_responses(logits, **settings(tokens), apply_temperature=False))
    # Sequences lie at 0..3, 4..6, 7..8; their responses at 2, 3 and 6.
    assert torch.equal(found[0][0], logits[0, 1:3]) and torch.equal(found[0][1], tokens[0][2:])
    assert torch.equal(found[1][0], logits[0, 5:6]) and torch.equal(found[1][1], tokens[1][2:])
    assert found[2][0].shape == (0, 5) and found[2][1].shape == (0,)


def test_logprobs_and_entropy_are_of_the_tempered_distribution():
    logits, tokens = make()
    empty, found = get_log_probs_and_entropy(logits, **settings(tokens), with_entropy=True)
    expected = torch.log_softmax(logits[0, 5] / 2, -1)
    torch.testing.assert_close(found["log_probs"][1][0], expected[tokens[1][2]])
    torch.testing.assert_close(found["entropy"][1][0], -(expected.exp() * expected).sum())
    assert empty.numel() == 0 and [len(part) for part in found["log_probs"]] == RESPONSES
    torch.cat(found["log_probs"]).sum().backward()
    assert logits.grad is not None and logits.grad[0, 3].eq(0).all()
    assert "entropy" not in get_log_probs_and_entropy(logits, **settings(tokens))[1]


@pytest.mark.parametrize(
    ("arguments", "keywords", "expected"),
    [
        # (1 + 2) / 2 + 4 / 1
        ((), {}, 5.5),
        ((False,), {}, 5.5),
        ((True,), {}, 7.0),
        (([4, 4, 1],), {}, 1.75),
        (([4, 4, 1], True), {}, 7.0),
        ((), {"calculate_per_token_loss": True}, 7.0),
    ],
)
def test_both_call_forms_of_the_reducer(arguments, keywords, expected):
    masks = [torch.tensor([1, 1, 0]), torch.tensor([1]), torch.tensor([0])]
    values = torch.tensor([1.0, 2.0, 9.0, 4.0, 9.0])
    reduce = get_sum_of_sample_mean([5, 3, 2], [3, 1, 1], masks, *arguments, **keywords)
    assert float(reduce(values)) == expected
