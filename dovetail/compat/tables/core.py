"""Types, rollout functions, data sources, filters, and what surrounds them."""

from __future__ import annotations

from dovetail.compat.row import MILES, SLIME, VIME, Alias

_MODULES = "dovetail.compat.modules"

ALIASES: tuple[Alias, ...] = (
    Alias("dovetail.types.sample", ("utils.types",)),
    Alias(f"{_MODULES}.base_types", ("rollout.base_types",)),
    Alias(f"{_MODULES}.filter_types", ("rollout.filter_hub.base_types",)),
    Alias(
        "dovetail.rollout.filters",
        (
            "rollout.filter_hub.dynamic_sampling_filters",
            "rollout.filter_hub.diversity_sampling_filters",
        ),
    ),
    Alias("dovetail.data.family_source", ("rollout.data_source", "ray.rollout_data_source")),
    Alias(f"{_MODULES}.forms", ("rollout.sample_hooks",), (SLIME, VIME)),
    # The default rollout, and what was built on it.
    Alias(
        f"{_MODULES}.rollout", ("rollout.sglang_rollout", "rollout.sglang_example"), (SLIME, MILES)
    ),
    Alias(f"{_MODULES}.rollout", ("rollout.vllm_rollout", "rollout.vllm_example"), (VIME,)),
    Alias(f"{_MODULES}.sft_rollout", ("rollout.sft_rollout", "rollout.sft_example")),
    Alias(f"{_MODULES}.fully_async", ("rollout.fully_async_rollout",)),
    Alias(f"{_MODULES}.on_policy_distillation", ("rollout.on_policy_distillation",)),
    Alias(f"{_MODULES}.async_buffer", ("rollout.fully_async_data_buffer",), (MILES,)),
    Alias(f"{_MODULES}.checkpoint_eval", ("rollout.checkpoint_eval",), (MILES,)),
    Alias(
        f"{_MODULES}.inference_rollout",
        (
            "rollout.inference_rollout.inference_rollout_common",
            "rollout.inference_rollout.inference_rollout_train",
            "rollout.inference_rollout.inference_rollout_eval",
            "rollout.inference_rollout.compatibility",
            "rollout.modular_rollout.orchestration_common",
            "rollout.modular_rollout.orchestration_train",
            "rollout.modular_rollout.orchestration_eval",
            "rollout.modular_rollout.orchestration_entrypoint",
            "rollout.modular_rollout.compatibility",
        ),
        (MILES,),
    ),
    Alias(f"{_MODULES}.single_turn", ("rollout.generate_hub.single_turn",), (MILES,)),
    Alias("dovetail.rollout.multi_turn", ("rollout.generate_hub.multi_turn",), (MILES,)),
    Alias("dovetail.rollout.session", ("rollout.generate_hub.agentic_tool_call",), (MILES,)),
    Alias("dovetail.router.sessions.samples", ("rollout.session.v2.picker_hub",), (MILES,)),
    Alias(
        f"{_MODULES}.session_tracer", ("rollout.generate_utils.openai_endpoint_utils",), (MILES,)
    ),
    Alias(
        f"{_MODULES}.radix_tree",
        (
            "router.middleware_hub.radix_tree_middleware",
            "router.middleware_hub.radix_tree",
            "router.middleware.radix_tree_middleware",
        ),
        (SLIME, MILES),
    ),
    # What plugins use beside.
    Alias(f"{_MODULES}.misc", ("utils.misc",)),
    Alias(f"{_MODULES}.http", ("utils.http_utils",)),
    Alias(f"{_MODULES}.async_loop", ("utils.async_utils",)),
    Alias(f"{_MODULES}.command", ("utils.external_utils.command_utils",)),
    Alias(f"{_MODULES}.prefill", ("rollout.generate_utils.prefill_logprobs",), (MILES,)),
    Alias(f"{_MODULES}.dumper", ("utils.dumper_utils",), (MILES,)),
    Alias(f"{_MODULES}.lora", ("utils.lora",), (MILES,)),
    Alias(f"{_MODULES}.logging", ("utils.logging_utils", "observability.logging_utils")),
    Alias(f"{_MODULES}.metrics", ("utils.metric_utils", "observability.metric_utils")),
    Alias(f"{_MODULES}.timer", ("utils.timer", "observability.timer")),
    Alias(
        f"{_MODULES}.tensorboard",
        (
            "utils.tensorboard_utils",
            "observability.tensorboard_utils",
            "utils.tracking_utils.tensorboard_utils",
        ),
    ),
    Alias(
        f"{_MODULES}.wandb",
        ("utils.wandb_utils", "observability.wandb_utils", "utils.tracking_utils.wandb_utils"),
    ),
)
