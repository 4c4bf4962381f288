"""Logprobs and gradients in pieces equal those of materialised logits."""

import pytest
import torch

from dovetail.algorithms import logprobs
from dovetail.algorithms.logprobs import Head, head_gradients, head_logprobs

N, H, V = 150, 8, 50


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(logprobs, "PIECE_ELEMENTS", V)


def case(bias, scale, softcap):
    torch.manual_seed(0)
    hidden = torch.randn(N, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    offset = torch.randn(V, requires_grad=True) if bias else None
    head = Head(weight, offset, scale, softcap)
    return hidden, head, torch.randint(V, (N,)), torch.randn(N), torch.randn(N)


def materialised(hidden, head, targets, temperature):
    logits = torch.nn.functional.linear(hidden, head.weight_VH, head.bias_V) * head.scale
    if head.softcap:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    every = torch.log_softmax(logits / temperature, -1)
    return every.gather(1, targets[:, None]).squeeze(1), -(every.exp() * every).sum(-1)


HEADS = [(False, 1.0, None), (True, 0.25, None), (False, 1.0, 2.0), (True, 3.0, 5.0)]


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropy(shape, temperature):
    hidden, head, targets, *_ = case(*shape)
    got = head_logprobs(hidden, head, targets, temperature)
    expected = materialised(hidden, head, targets, temperature)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradients(shape, temperature, with_entropy):
    hidden, head, targets, g, h = case(*shape)
    h = h * with_entropy

    def loss_of(part, logprobs_n, entropy_n):
        loss = (g[part] * logprobs_n.sin()).sum()
        return loss + (h[part] * entropy_n).sum() if with_entropy else loss

    logp, entropy = materialised(hidden, head, targets, temperature)
    inputs = [x for x in (hidden, head.weight_VH, head.bias_V) if x is not None]
    expected = torch.autograd.grad(loss_of(slice(0, N), logp, entropy), inputs)
    weight_grad = torch.zeros(V, H)
    bias_grad = None if head.bias_V is None else torch.zeros(V)
    got = head_gradients(
        hidden.detach(), head, targets, temperature, loss_of, weight_grad, bias_grad
    )
    for a, b in zip((got, weight_grad, bias_grad), expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_the_loss_sees_every_token_once_and_pieces_stay_small():
    hidden, head, targets, *_ = case(False, 1.0, None)
    seen = []

    def loss_of(part, logprobs_n, entropy_n):
        seen.append((part.start, part.stop))
        return logprobs_n.sum()

    head_gradients(hidden.detach(), head, targets, 1.0, loss_of)
    assert seen == [(0, 50), (50, 100), (100, 150)]


def test_no_tokens_give_an_empty_gradient():
    head = Head(torch.randn(V, H))
    empty = torch.empty(0, H)
    got = head_gradients(empty, head, torch.empty(0, dtype=torch.long), 1.0, lambda *_: 0)
    assert got.shape == (0, H)
