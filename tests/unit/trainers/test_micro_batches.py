"""Micro-batching, padding and prompt sharing never change the gradient."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainers.tiny import furthest, gradient_of, make_model, make_rows

MODEL, REFERENCE = make_model(seed=1), make_model(seed=2)
EVERYTHING = {
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "k3",
    "entropy_coef": 0.05,
    "eps_clip_c": 3.0,
}


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=st.integers(8, 200),
    max_rows=st.sampled_from([None, 1, 3]),
    layout=st.sampled_from(["shared", "packed", "padded"]),
    per_token=st.booleans(),
)
def test_any_micro_batching_gives_the_same_gradient(seed, budget, max_rows, layout, per_token):
    rows = make_rows(seed)
    algorithm = {**EVERYTHING, "calculate_per_token_loss": per_token}
    whole = gradient_of(MODEL, rows, REFERENCE, share=False, algorithm=algorithm)
    split = gradient_of(
        MODEL,
        rows,
        REFERENCE,
        pad=layout == "padded",
        share=layout == "shared",
        algorithm=algorithm,
        batch={"max_tokens_per_gpu": budget, "micro_batch_size": max_rows},
    )
    # Rounding of float32: 1.7e-6 at worst over some thousand draws.
    assert furthest(whole, split) < 5e-6


@pytest.mark.parametrize("per_token", [True, False])
def test_rows_of_one_rollout_may_be_torn_apart(per_token):
    rows = make_rows(prompts=2)
    together = [dataclasses.replace(r, rollout_id=r.index // 2) for r in rows]
    algorithm = {"calculate_per_token_loss": per_token}
    whole = gradient_of(MODEL, together, algorithm=algorithm)
    torn = gradient_of(MODEL, together, algorithm=algorithm, batch={"micro_batch_size": 1})
    assert furthest(whole, torn) < 1e-6
