"""Attention over packed trees equals attention of each sequence alone."""

import pytest
import torch

from dovetail.batch.pack import Segment
from dovetail.trainers.torch.tree_attention import (
    TreeAttentionUnsupportedError,
    attention_by_segment,
    tree_attention,
)

LINE = (
    Segment(0, 10),
    Segment(10, 5, 0, 10),
    Segment(15, 1, 0, 10),
    Segment(16, 9),
    Segment(25, 40),
    Segment(65, 3, 25, 40),
    Segment(68, 33, 25, 40),
)
TOKENS = 101


def make_inputs(key_heads, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((1, 4, TOKENS, 8), (1, key_heads, TOKENS, 8), (1, key_heads, TOKENS, 8))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def one_by_one(query, key, value):
    """Materialised softmax over the whole line under a dense mask."""
    allowed = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for s in LINE:
        for at in range(s.start, s.start + s.length):
            allowed[at, s.start : at + 1] = True
            allowed[at, s.prefix_start : s.prefix_start + s.prefix_length] = True
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ value


def ours(query, key, value):
    module = torch.nn.Module()
    out, _ = tree_attention(module, query, key, value, None, scaling=0.3, tree_line=LINE)
    return out.transpose(1, 2)


def by_segment(query, key, value):
    return attention_by_segment(query, key, value, LINE, 0.3)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("way", [ours, by_segment])
def test_output_and_gradients_equal_a_dense_mask(way, key_heads):
    inputs = make_inputs(key_heads)
    expected, got = one_by_one(*inputs), way(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_within_its_rounding():
    inputs = make_inputs(2, torch.bfloat16)
    expected = one_by_one(*[x.detach().float() for x in inputs])
    assert (ours(*inputs).float() - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tree_line": None}, "does not hand keywords down"),
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
    ],
)
def test_what_packed_lines_do_not_do_is_refused(more, message):
    settings = {"tree_line": LINE, **more}
    with pytest.raises(TreeAttentionUnsupportedError, match=message):
        tree_attention(torch.nn.Module(), *make_inputs(4), None, **settings)
