"""The user's functions: registered name, pkg.mod.attr, pkg.mod:attr or path/file.py:attr."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dovetail.config.sections.base import Section


def _path(summary: str) -> Any:
    return Field(None, description=summary)


def _paths(summary: str) -> Any:
    return Field([], description=summary)


class HooksConfig(Section):
    """The user's functions: registered name, pkg.mod.attr, pkg.mod:attr or path/file.py:attr."""

    data_source_path: str | None = _path("Makes the source of prompts.")
    buffer_filter_path: str | None = _path("Chooses groups out of the buffer.")
    rollout_function_path: str | None = _path("Collects all samples of a step.")
    eval_function_path: str | None = _path("Evaluates the policy.")
    custom_generate_function_path: str | None = _path("Makes the response of one sample.")
    rollout_sample_hook_path: list[str] = _paths(
        "Sees one generated sample before its reward; may be given several times."
    )
    custom_rm_path: str | None = _path("The reward of a sample, or of a whole group (--group-rm).")
    dynamic_sampling_filter_path: str | None = _path("Keeps or drops a finished group.")
    rollout_sample_filter_path: str | None = _path("Takes samples of a step out of the loss.")
    rollout_all_samples_process_path: str | None = _path(
        "Sees every finished group of a step, dropped ones too."
    )
    custom_rollout_log_function_path: str | None = _path("Logs a step's samples.")
    custom_eval_rollout_log_function_path: str | None = _path("Logs an evaluation.")
    custom_reward_post_process_path: str | None = _path(
        "Turns rewards into what advantages start from."
    )
    custom_convert_samples_to_train_data_path: str | None = _path(
        "Turns a step's samples into training data."
    )
    rollout_data_postprocess_path: str | None = _path(
        "Changes the training data when advantages are known."
    )
    custom_advantage_function_path: str | None = _path("Computes advantages and returns.")
    custom_loss_function_path: str | None = _path("The loss, with --loss-type custom_loss.")
    custom_tis_function_path: str | None = _path(
        "Corrects the policy loss for what engine and trainer disagree on."
    )
    custom_pg_loss_reducer_function_path: str | None = _path(
        "Makes the function that reduces the policy loss to a scalar."
    )
    custom_megatron_init_path: str | None = _path("Runs after Megatron is initialised.")
    custom_megatron_before_log_prob_hook_path: str | None = _path(
        "Runs before Megatron computes logprobs."
    )
    custom_megatron_before_train_step_hook_path: str | None = _path(
        "Runs before each optimizer step of Megatron."
    )
    custom_megatron_post_save_hook_path: str | None = _path(
        "Runs after Megatron wrote a checkpoint."
    )
    custom_model_provider_path: str | None = _path("Makes Megatron's model.")
    router_middleware_paths: list[str] = _paths(
        "Stands between the router's clients and its engines; may be given several times."
    )
    custom_agent_function_path: str | None = _path("Runs an agent against a session's address.")
    session_message_matcher: str | None = _path(
        "Says whether a message that an agent sent back is the recorded one: strict, "
        "loose_tool_call, role_content_only, or a function."
    )
    session_sample_picker_path: str | None = _path("Chooses among a session's samples.")
    session_sample_postprocessor_path: str | None = _path("Changes a session's chosen samples.")
    generate_tool_specs_path: str | None = _path("The list of tools for multi-turn generation.")
    generate_execute_tool_function_path: str | None = _path(
        "Runs one tool call of multi-turn generation."
    )
    custom_update_weight_post_write_path: str | None = _path(
        "Runs after weights were written for the engines."
    )
    sglang_custom_pull_weights_pre_read_hook: str | None = _path(
        "Runs in an SGLang engine before it reads written weights."
    )
    vllm_custom_pull_weights_pre_read_hook: str | None = _path(
        "Runs in a vLLM engine before it reads written weights."
    )
    custom_async_data_buffer_path: str | None = _path(
        "Makes the buffer of finished groups of an asynchronous run."
    )
    custom_config_path: str | None = Field(
        None,
        description="YAML file, or base64: and YAML in base64; its keys become attributes of args.",
    )
    compat_imports: bool = Field(
        True,
        description=(
            "Functions may import slime, vime and miles where those are not installed: they get"
            " Dovetail's modules."
        ),
    )
    plugin_args: dict[str, Any] = Field(
        {},
        description="Further attributes of args; flags that a function adds itself end up here.",
    )
    hook_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Seconds after which a user's function that did not return ends the run.",
    )
    generate_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="Seconds after which custom generation of one sample fails its group.",
    )
    check_hooks: bool = Field(
        True,
        description=(
            "Try the functions out on small inputs, in a process of their own, before anything is"
            " loaded."
        ),
    )
    hook_check_timeout_s: float = Field(
        2.5, gt=0, description="Seconds that one call may take when functions are tried out."
    )
