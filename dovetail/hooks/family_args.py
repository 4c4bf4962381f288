"""What plugins of the slime family may read of `args` and no setting of ours stands for.

The value is the one that is true of a run of this package, or else the family's own default.
"""

from __future__ import annotations

from typing import Any

FACTS: dict[str, Any] = {
    "rank": 0,
    "world_size": 1,
    "local_rank": 0,
    "start_rollout_id": 0,
    "rehearsal": False,
    "sglang_router_ip": None,
    "sglang_router_port": None,
    "vllm_router_ip": None,
    "vllm_router_port": None,
    "eval_datasets": [],
}
"""Known only while a run is going on: until then, these."""

SETTABLE = frozenset(
    {
        "max_weight_staleness",
        "async_max_concurrent_samples",
        "async_data_buffer_capacity_factor",
        "async_unused_samples_handler",
        "sglang_tool_call_parser",
        "sglang_reasoning_parser",
        "vllm_tool_call_parser",
        "vllm_reasoning_parser",
    }
)
"""Those of FAMILY_ARGS that only rollout and generate functions read: a custom config may set
them."""

FAMILY_ARGS: dict[str, Any] = {
    # placement
    "offload": False,
    # train
    "qwen_gdn_backend": "fla",
    "train_env_vars": {},
    "update_weight_transport": "nccl",
    "release_train": False,
    "update_weight_disk_keep_files": False,
    "update_weight_delta_encoding": "xor",
    "update_weight_delta_checksum": "xxh3-128",
    "update_weight_local_checkpoint_dir": None,
    "recompute_loss_function": False,
    "log_probs_chunk_size": -1,
    "only_train_params_name_list": None,
    "freeze_params_name_list": None,
    "freeze_indexer": False,
    "allgather_cp": False,
    # rollout
    "model_name": None,
    "keep_old_actor": False,
    "rollout_data_transport": "object-store",
    # fault tolerance
    # data
    "balance_data": False,
    "balance_by_flops": False,
    "use_dynamic_batch_size": True,
    "log_probs_max_tokens_per_gpu": None,
    # algorithm
    "ref_ckpt_step": None,
    "no_save_optim": False,
    "megatron_config_path": None,
    "ref_update_interval": None,
    "use_rollout_entropy": False,
    "reset_optimizer_states": False,
    "use_stateless_adam": False,
    # on-policy distillation
    "opd_teacher_ckpt_step": None,
    # wandb
    "wandb_dir": None,
    "wandb_key": None,
    "wandb_host": None,
    "wandb_team": None,
    "wandb_always_use_train_step": False,
    "log_multi_turn": False,
    "log_reward_category": None,
    "log_correct_samples": False,
    "wandb_run_id": None,
    # tensorboard
    "tb_project_name": None,
    "tb_experiment_name": None,
    # debug
    "load_forge_rollout_data": None,
    "load_debug_rollout_data_subsample": None,
    "save_debug_train_data": None,
    "dump_details": None,
    "memory_snapshot_dir": ".",
    "memory_snapshot_num_steps": None,
    "profile_target": ["train_overall"],
    "memory_recorder": "torch",
    "record_memory_history": False,
    # network
    "http_proxy": None,
    "use_distributed_post": False,
    # rollout buffer / filters
    "rollout_buffer_url": None,
    "fetch_trajectory_retry_times": -1,
    "min_batch_collection_ratio": 1,
    "rollout_task_type": "math",
    "loss_mask_type": "qwen",
    "data_pad_size_multiplier": 128,
    # Megatron hooks
    "megatron_deepgemm_forward_layers": None,
    "megatron_deepgemm_forward_modules": None,
    "megatron_deepgemm_moe_forward_layers": None,
    "megatron_deepgemm_moe_forward_modules": None,
    # MTP
    "mtp_num_layers": None,
    "mtp_loss_scaling_factor": 0.2,
    "enable_mtp_training": False,
    # CI
    "ci_test": False,
    "ci_disable_kl_checker": False,
    "ci_train_rollout_logprob_abs_diff_threshold": 0.1,
    "ci_save_grad_norm": None,
    "ci_load_grad_norm": None,
    # misc
    "padded_vocab_size": None,
    # engines
    "prefill_num_servers": None,
    "sglang_config": None,
    # mode
    # Megatron
    "virtual_pipeline_model_parallel_size": None,
    "data_parallel_size": 1,
    "fp16": False,
    "params_dtype": None,
    "num_experts": None,
    "qkv_format": "thd",
    # positive spellings of --disable-* flags
    "rollout_global_dataset": True,
    "compute_advantages_and_returns": True,
    "wandb_random_suffix": True,
    # engines, read by plugins
    "sglang_enable_deterministic_inference": False,
    "sglang_speculative_algorithm": None,
    "sglang_tool_call_parser": None,
    "sglang_reasoning_parser": None,
    "sglang_model_routers": None,
    "sglang_router_policy": None,
    "sglang_dp_size": 1,
    "sglang_tp_size": 1,
    "vllm_config": None,
    "vllm_enable_deterministic_inference": False,
    "vllm_tool_call_parser": None,
    "vllm_reasoning_parser": None,
    # only in miles
    "use_session_server": None,
    "fully_async": False,
    "rollout_submission_granularity": None,
    "pause_generation_mode": "retract",
    "rollout_external": False,
    "disable_rollout_trim_samples": False,
    "use_dynamic_global_batch_size": False,
    "true_on_policy_mode": False,
    "recompute_logprobs_via_prefill": False,
    "debug_skip_weight_update": False,
    "debug_disable_optimizer": False,
    "debug_exit_after_rollout": False,
    "indep_dp": False,
    "chat_template_path": None,
    "allow_partial_train_step": False,
    "eval_num_gpus": 0,
    "eval_hf_dir": None,
    "eval_max_in_flight": 2,
    "observe_training_entropy": False,
    "skip_actor_forward_only": False,
    "use_indexer_replay": False,
    "use_rollout_indexer_replay": False,
    "opd_log_prob_top_k": 0,
    "opd_top_k_strategy": "only-student",
    "save_debug_trajectory_data": None,
    "save_debug_event_data": None,
    "dumper_enable": False,
    "lora_type": "lora",
    "exclude_modules": None,
    "lora_adapter_path": None,
    "multi_lora_n_adapters": 0,
    "use_mlflow": False,
    "use_prometheus": False,
    "tito_model": "default",
    "session_server_ip": None,
    "session_server_port": None,
    "megatron_to_hf_mode": "raw",
}
