"""Which function rehearses which slot, loaded when it is used."""

from __future__ import annotations

_HERE = "dovetail.run.rehearse"

REHEARSALS: dict[str, str] = {
    "custom_rm": f"{_HERE}.rewards:reward",
    "custom_reward_post_process": f"{_HERE}.rewards:post_process",
    "dynamic_sampling_filter": f"{_HERE}.filters:dynamic_filter",
    "buffer_filter": f"{_HERE}.filters:buffer_filter",
    "rollout_sample_filter": f"{_HERE}.filters:sample_filter",
    "rollout_all_samples_process": f"{_HERE}.filters:all_samples",
    "rollout_sample_hook": f"{_HERE}.filters:sample_hook",
    "custom_generate_function": f"{_HERE}.generate:generate",
    "custom_agent_function": f"{_HERE}.agent:agent",
    "router_middleware": f"{_HERE}.http:middleware",
    "rollout_function": f"{_HERE}.rollout:rollout",
    "eval_function": f"{_HERE}.rollout:evaluation",
    "data_source": f"{_HERE}.source:data_source",
    "custom_rollout_log_function": f"{_HERE}.logs:rollout_log",
    "custom_eval_rollout_log_function": f"{_HERE}.logs:eval_log",
    "custom_convert_samples_to_train_data": f"{_HERE}.convert:convert",
    "rollout_data_postprocess": f"{_HERE}.training:postprocess",
    "custom_advantage_function": f"{_HERE}.training:advantage",
    "custom_loss_function": f"{_HERE}.training:loss",
    "custom_tis_function": f"{_HERE}.training:correction",
    "custom_pg_loss_reducer_function": f"{_HERE}.training:reducer",
}
"""By slot; what has no row is only matched."""


def row_of(slot: str) -> str | None:
    """`module:function` that takes (hook, stage), or None."""
    return REHEARSALS.get(slot)
