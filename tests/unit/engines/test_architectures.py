"""Every tested architecture: the engine's numbers are those of the model's plain forward."""

import pytest
import torch

from tests.unit.engines.tiny import (
    ARCHITECTURES,
    generate,
    prompt_of,
    request,
    tiny_engine,
    tiny_model,
    worst_logprob_error,
)

FUSABLE = {"llama", "llama3 rope", "qwen2", "qwen3", "mistral"}


def mixed_requests():
    """Groups, a prompt of one token, a continued response; more requests than rows."""
    requests = [
        request(f"{i}.{k}", prompt_of(n, i), max_new_tokens=3 + 6 * k, seed=i + k, temperature=0.8)
        for i, n in enumerate((3, 1, 20, 90, 33))
        for k in range(3)
    ]
    resumed = (*prompt_of(90, 3), 5, 6, 7)
    return [*requests, request("resumed", resumed, num_generated=3, max_new_tokens=9, seed=3)]


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_equal_the_full_forward_and_greedy_equals_generate(name, fused):
    model = tiny_model(name)
    engine = tiny_engine(model, fused=fused)
    assert engine.fused == (fused == "auto" and name in FUSABLE), engine.fused_reason
    if engine.fused:
        engine._core.scheduler.min_saved_tokens = 0
    requests = mixed_requests()
    assert worst_logprob_error(model, requests, generate(engine, requests)) < 1e-4
    prompt = prompt_of(30)
    ids = torch.tensor([prompt])
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
    )
    results = generate(
        engine, [request(i, prompt, temperature=0.0, max_new_tokens=20) for i in range(2)]
    )
    assert [r.token_ids for r in results] == [wanted[0, 30:].tolist()] * 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_implementations_of_the_modules_work(attention):
    model = tiny_model("gemma3")
    model.set_attn_implementation(attention)
    requests = mixed_requests()
    results = generate(tiny_engine(model), requests)
    assert worst_logprob_error(model, requests, results) < 1e-4


@pytest.mark.parametrize("saved", [0, 10**9])
def test_bfloat16_stays_close_to_the_full_forward(saved):
    model = tiny_model("qwen3", initializer_range=0.1).to(torch.bfloat16)
    engine = tiny_engine(model, fused="on", kv_tokens=4000)
    engine._core.scheduler.min_saved_tokens = saved
    requests = mixed_requests()
    assert worst_logprob_error(model, requests, generate(engine, requests)) < 0.1
