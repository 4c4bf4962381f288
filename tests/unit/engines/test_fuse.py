"""Joined weights: one storage, no second copy, and every in-place write is seen."""

import copy

import pytest
import torch

from dovetail.engines.embedded.fuse import Joined
from dovetail.types.errors import EngineError
from tests.unit.engines.tiny import (
    generate,
    prompt_of,
    request,
    tiny_engine,
    tiny_model,
    worst_logprob_error,
)


def test_projections_become_views_of_one_storage_and_values_stay():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    tiny_engine(model, fused="on")
    attention = model.model.layers[0].self_attn
    storages = {
        p.weight.untyped_storage().data_ptr()
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert len(storages) == 1
    sizes = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    assert sum(sizes.values()) == sum(p.numel() * p.element_size() for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_optimizer_step_is_seen_by_the_next_request_without_publishing():
    model = tiny_model("qwen3")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    engine = tiny_engine(model, fused="on")
    asked = [request(i, prompt_of(12), max_new_tokens=6, seed=i) for i in range(3)]
    for _ in range(2):
        results = generate(engine, asked)
        assert worst_logprob_error(model, asked, results) < 1e-4
        model(torch.tensor([prompt_of(12)])).logits.logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = generate(engine, asked)
    assert worst_logprob_error(model, asked, changed) < 1e-4
    assert changed[0].logprobs != results[0].logprobs


def test_parameters_that_someone_re_pointed_are_joined_again():
    model = tiny_model("qwen3")
    engine = tiny_engine(model, fused="on")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.1
    asked = [request(0, prompt_of(12))]
    assert worst_logprob_error(model, asked, generate(engine, asked)) < 1e-4
    model(torch.tensor([prompt_of(12)])).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_joined_notices_a_moved_part_only():
    parts = [torch.nn.Parameter(torch.full((n, 2), float(n))) for n in (1, 2)]
    joined = Joined(parts)
    whole = joined.whole
    joined.refresh()
    assert joined.whole is whole
    parts[1].data = torch.zeros(2, 2)
    joined.refresh()
    assert joined.whole.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]


def test_on_raises_with_the_reason_and_auto_states_it():
    model = tiny_model("gemma")
    with pytest.raises(EngineError, match=r"GemmaForCausalLM is not one of.*--engine-fused"):
        tiny_engine(model, fused="on")
    assert "GemmaForCausalLM" in tiny_engine(model).fused_reason
    assert tiny_engine(fused="off").fused_reason == "switched off"


def test_a_fused_path_that_computes_something_else_is_not_taken(monkeypatch):
    model = tiny_model("qwen3")
    # A subclass's forward that the fused path knows nothing of.
    inner = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda x: inner(x) * 1.5)
    engine = tiny_engine(model)
    assert not engine.fused and "differ from the model's" in engine.fused_reason
    with pytest.raises(EngineError, match="differ from the model's"):
        tiny_engine(model, fused="on")
