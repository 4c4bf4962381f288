"""Evaluation sets as the configuration names them, read and tokenised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dovetail.config.eval_sets import EvalSetConfig, eval_sets
from dovetail.config.run import RunConfig
from dovetail.data.build import load_eval_set
from dovetail.rollout.evaluate import EvalSet
from dovetail.rollout.sampling import rollout_sampling


def load_eval_sets(config: RunConfig, tokenizer: Any, max_prompt_len: int) -> list[EvalSet]:
    """Every held-out set; prompts of more than `max_prompt_len` tokens are left out and counted.

    Raises:
        DataError: no or malformed data, or nothing of it is short enough.
    """
    return [_load(one, config, tokenizer, max_prompt_len) for one in eval_sets(config)]


def _load(one: EvalSetConfig, config: RunConfig, tokenizer: Any, limit: int) -> EvalSet:
    samples = load_eval_set(
        one.path,
        config.data,
        tokenizer,
        input_key=one.input_key,
        label_key=one.label_key,
        max_prompt_len=min(one.max_prompt_len or limit, limit),
    )
    sampling = replace(
        rollout_sampling(config.rollout),
        max_new_tokens=one.max_response_len,
        temperature=one.temperature,
        top_p=one.top_p,
        top_k=one.top_k,
    )
    return EvalSet(
        name=one.name,
        samples=samples,
        n_samples=one.n_samples_per_eval_prompt,
        sampling=sampling,
        reward_key=one.reward_key,
        rm_type=one.rm_type,
        custom_rm_path=one.custom_rm_path,
        custom_generate_function_path=one.custom_generate_function_path,
        metadata=one.metadata,
    )
