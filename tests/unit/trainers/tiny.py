"""Tiny models of several architectures, rows for them, and a trainer with few words."""

import random

import torch
import transformers

from dovetail.batch.rows import TrainRow
from dovetail.config.sections import AlgorithmConfig, BatchConfig, OptimizerConfig
from dovetail.trainers.data_parallel import ALONE
from dovetail.trainers.torch.backend import TorchBackend
from dovetail.trainers.trainer import Trainer

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE = {
    "Qwen3": {"tie_word_embeddings": True},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Mistral": {"sliding_window": 16},
    "Gemma2": {"sliding_window": 16, "final_logit_softcapping": 3.0},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
}
ARCHITECTURES = ["Llama", "Qwen2", "Qwen3", "Qwen3Moe", "Mistral", "Gemma2", "Granite", "Cohere"]


def make_model(name="Qwen3", dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **MORE.get(name, {}), **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        # Fresh weights are so small that attention hardly shows in the logits.
        for param in model.parameters():
            if param.ndim > 1:
                param.mul_(4)
    return model.to(dtype)


def make_rows(seed=0, prompts=3, group=4, prompt=(2, 9), response=(1, 10), mask=0.8):
    draw = random.Random(seed)
    rows = []
    for g in range(prompts):
        start = [draw.randrange(VOCAB) for _ in range(draw.randint(*prompt))]
        for _ in range(group):
            length = draw.randint(*response)
            rows.append(
                TrainRow(
                    tokens=start + [draw.randrange(VOCAB) for _ in range(length)],
                    response_length=length,
                    loss_mask=[int(draw.random() < mask) for _ in range(length)],
                    reward=draw.random(),
                    group_index=g,
                    index=len(rows),
                )
            )
    return rows


def make_trainer(
    model,
    reference=None,
    *,
    algorithm=None,
    batch=None,
    optimizer=None,
    temperature=1.0,
    total_optimizer_steps=None,
    parallel=ALONE,
    **more,
):
    settings = AlgorithmConfig(**(algorithm or {}))
    rates = OptimizerConfig(**{"lr": 1e-2, **(optimizer or {})})
    teacher = more.get("teacher")
    backend = TorchBackend(
        model,
        reference if settings.needs_reference else None,
        BatchConfig(**(batch or {})),
        rates,
        temperature=temperature,
        total_steps=total_optimizer_steps,
        routing_replay=settings.routing_replay,
        others=[teacher.scored] if teacher else [],
        parallel=parallel,
    )
    own = {
        "pad_token_id": 0,
        "samples_per_optimizer_step": 10**6,
        "max_nonfinite_steps": rates.max_nonfinite_steps,
        **more,
    }
    return Trainer(backend, settings, temperature=temperature, **own)


def keep_gradient(trainer):
    """Make the trainer's steps keep their gradient and change nothing; returns where it lands."""
    kept = {}
    optimizer = trainer.backend.optimizer
    real = optimizer.step

    def step():
        for param in optimizer.params.values():
            optimizer.grad_for(param)
        kept.update({name: grad.clone() for name, grad in optimizer.main_grads.items()})
        optimizer.main_grads[next(iter(optimizer.params))].fill_(torch.nan)
        return real()

    optimizer.step = step
    return kept


def gradient_of(model, rows, reference=None, pad=False, share=True, **more):
    """The gradient that one step over the rows would apply."""
    trainer = make_trainer(model, reference, **more)
    trainer.backend.share_prompts = share
    if pad:
        trainer.backend.policy.packs = False
    kept = keep_gradient(trainer)
    trainer.train(rows)
    return kept


def furthest(a, b):
    """Largest difference between two gradients, over the largest entry."""
    scale = max(float(g.abs().max()) for g in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / scale
