"""Tiny models with random weights, a character tokenizer, and what a plain forward says."""

import asyncio

import torch
import transformers

from dovetail.engines.embedded.engine import EmbeddedEngine
from dovetail.types.calls import GenerateRequest, SamplingParams

VOCAB = 101
_BASE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
_MOE = {"head_dim": 16, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2 sliding": ("Qwen2Config", "Qwen2ForCausalLM", _SLIDING),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _MOE),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "mistral sliding": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
}


class CharTokenizer:
    """One character per id; id 1 is a special token without text."""

    eos_token_id = 2
    pad_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [ord(c) - 28 for c in text]

    def decode(self, token_ids, skip_special_tokens=False):
        kept = [i for i in token_ids if not (skip_special_tokens and i == 1)]
        return "".join("<s>" if i == 1 else chr(i + 28) for i in kept)


def tiny_model(name="qwen3", **overrides):
    config_name, model_name, extra = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**_BASE, **extra, **overrides})
    return getattr(transformers, model_name)(config).eval()


def tiny_engine(model=None, tokenizer=None, **overrides):
    """Roomy enough for most tests."""
    settings = {"max_running": 5, "kv_tokens": 600, "max_context_len": 200, "fused": "auto"}
    return EmbeddedEngine(model or tiny_model(), tokenizer, **{**settings, **overrides})


def request(name, prompt, num_generated=0, **sampling):
    params = SamplingParams(**{"max_new_tokens": 8, "seed": 0, **sampling})
    return GenerateRequest(str(name), tuple(prompt), params, num_generated)


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def generate(engine, requests):
    async def everyone():
        return await asyncio.gather(*(engine.generate(r) for r in requests))

    return asyncio.run(everyone())


def worst_logprob_error(model, requests, results):
    """Largest |engine logprob - full forward's| under the convention of `SamplingParams`."""
    worst = 0.0
    for asked, result in zip(requests, results, strict=True):
        ids = torch.tensor([[*asked.prompt_ids, *result.token_ids]])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0].float()
        wanted = torch.log_softmax(logits / (asked.sampling.temperature or 1.0), -1)
        count = len(result.token_ids)
        picked = wanted[-count - 1 : -1].gather(1, ids[0, -count:, None])[:, 0]
        worst = max(worst, float((picked - torch.tensor(result.logprobs)).abs().max()))
    return worst
