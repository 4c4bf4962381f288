"""Evaluation sets: from flags and tables to one record per set, every inherited value filled in."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from dovetail.config.leaves import cure, nearest
from dovetail.config.run import RunConfig
from dovetail.config.sections import Section
from dovetail.types.errors import ConfigError


class EvalSetConfig(Section):
    """One held-out set. Keys of `[eval.eval_sets.NAME]`; what is left out comes from the run."""

    name: str = Field(min_length=1, pattern=r"^[^/\s]+$")
    """Part of its metrics' names: `eval/<name>/...`."""
    path: str
    n_samples_per_eval_prompt: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    max_response_len: int = Field(256, ge=1)
    max_prompt_len: int | None = Field(None, ge=1)
    input_key: str = "input"
    label_key: str | None = None
    reward_key: str | None = None
    rm_type: str | None = None
    custom_rm_path: str | None = None
    custom_generate_function_path: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Laid over each sample's metadata."""


KEYS = tuple(name for name in EvalSetConfig.model_fields if name != "name")


def eval_sets(config: RunConfig) -> list[EvalSetConfig]:
    """Every evaluation set of a run: those of eval_prompt_data, then those of eval_sets.

    Raises:
        ConfigError: names and paths do not pair up, a name is there twice, a set's table has an
            unknown key or a wrong value.
    """
    pairs = _pairs(config.eval.eval_prompt_data)
    tables: list[tuple[str, dict[str, Any]]] = [(name, {"path": path}) for name, path in pairs]
    tables += list(config.eval.eval_sets.items())
    names = [name for name, _ in tables]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"evaluation set '{name}' is named twice; give each its own name in "
                f"{cure('eval_prompt_data')} and [eval.eval_sets.NAME]"
            )
    inherited = _inherited(config)
    return [_build(name, table, inherited) for name, table in tables]


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    if len(words) % 2:
        raise ConfigError(
            f"eval_prompt_data got {len(words)} words {words}, expected pairs: name path ...; "
            f"e.g. {cure('eval_prompt_data', 'heldout data/heldout.jsonl')}"
        )
    return list(zip(words[::2], words[1::2], strict=True))


def _inherited(config: RunConfig) -> dict[str, Any]:
    own, rollout, data = config.eval, config.rollout, config.data
    reward = config.reward

    def first(value: Any, fallback: Any) -> Any:
        return fallback if value is None else value

    return {
        "n_samples_per_eval_prompt": own.n_samples_per_eval_prompt,
        "temperature": first(own.eval_temperature, rollout.rollout_temperature),
        "top_p": first(own.eval_top_p, rollout.rollout_top_p),
        "top_k": first(own.eval_top_k, rollout.rollout_top_k),
        "max_response_len": first(own.eval_max_response_len, rollout.rollout_max_response_len),
        "max_prompt_len": first(own.eval_max_prompt_len, data.rollout_max_prompt_len),
        "input_key": first(own.eval_input_key, data.input_key),
        "label_key": first(own.eval_label_key, data.label_key),
        "reward_key": first(reward.eval_reward_key, reward.reward_key),
    }


def _build(name: str, table: dict[str, Any], inherited: dict[str, Any]) -> EvalSetConfig:
    where = f"evaluation set '{name}' (TOML: [eval.eval_sets.{name}])"
    for key in table:
        if key not in KEYS:
            closest = nearest(key, KEYS)
            hint = f"did you mean {closest}?" if closest else f"keys: {', '.join(KEYS)}"
            raise ConfigError(f"{where}: unknown key {key}; {hint}")
    try:
        return EvalSetConfig.model_validate({**inherited, "name": name, **table})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        got = "nothing" if problem["type"] == "missing" else repr(problem["input"])
        raise ConfigError(f"{where}: {key} got {got}: {problem['msg']}") from None
