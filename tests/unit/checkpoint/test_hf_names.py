"""Weights under the names of their files: the same tensors that `save_pretrained` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dovetail.checkpoint.hf_names import named_tensors, num_bytes
from dovetail.engines.embedded.fuse import fuse_layers
from tests.loop.tiny import CHARACTERS, SHAPE

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3 tied": {"tie_word_embeddings": True},
    "llama": {},
    "gemma3_text": {},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}


def _model(kind: str) -> Any:
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": len(CHARACTERS) + 3, "pad_token_id": 0, **KINDS[kind]}
    config = AutoConfig.for_model(kind.partition(" ")[0], **shape)
    return AutoModelForCausalLM.from_config(config)


def _saved(model: Any, path: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(path)
    return {
        name: tensor
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
def test_names_and_values_are_those_of_the_file(kind: str, loaded: bool, tmp_path: Path) -> None:
    model = _model(kind)
    expected = _saved(model, tmp_path)
    if loaded:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    given = list(named_tensors(model))
    assert len({name for name, _ in given}) == len(given)
    assert {name for name, _ in given} == expected.keys()
    for name, tensor in given:
        assert torch.equal(tensor, expected[name]), name
    assert num_bytes(model) == sum(tensor.nbytes for tensor in expected.values())


def test_nothing_is_copied_where_names_need_no_turning() -> None:
    model = _model("qwen3")
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {tensor.data_ptr() for _, tensor in named_tensors(model)} == own


def test_weights_that_are_views_of_fused_ones_keep_their_names(tmp_path: Path) -> None:
    model = _model("qwen3")
    expected = _saved(model, tmp_path)
    fuse_layers(model)
    found = dict(named_tensors(model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
