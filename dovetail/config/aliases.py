"""Foreign spellings: what slime, miles, vime and Megatron call our knobs, and what we do not have.

Four tables. `ALIASES` sets one of our leaves. `FIXED` has one value here. `WITHOUT_EFFECT` is
accepted with one warning, because a run here gives the same result whatever the value is.
`UNSUPPORTED` would change the result, so it stops the run by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alias:
    """A foreign name for one of our leaves."""

    leaf: str
    constant: Any = None
    """What the leaf becomes when the foreign switch is on; None: it takes the value given."""
    negates: bool = False
    """The foreign switch is the opposite of our leaf."""
    takes_value: bool = False
    """The foreign flag stands before a value."""

    def translate(self, value: Any) -> Any:
        """Our leaf's value for the foreign one."""
        if self.negates:
            return not value
        return value if self.constant is None else self.constant


ALIASES: dict[str, Alias] = {
    "disable_grpo_std_normalization": Alias("grpo_std_normalization", negates=True),
    "disable_rewards_normalization": Alias("rewards_normalization", negates=True),
    "colocate": Alias("mode", constant="colocated"),
    "bf16": Alias("dtype", constant="bfloat16"),
    "slime_router_middleware_paths": Alias("router_middleware_paths", takes_value=True),
    "miles_router_middleware_paths": Alias("router_middleware_paths", takes_value=True),
    "sglang_server_concurrency": Alias("server_concurrency", takes_value=True),
    "vllm_server_concurrency": Alias("server_concurrency", takes_value=True),
    "sglang_router_request_timeout_secs": Alias("router_request_timeout_s", takes_value=True),
    "router_request_timeout_secs": Alias("router_request_timeout_s", takes_value=True),
    "slime_router_timeout": Alias("router_request_timeout_s", takes_value=True),
    "miles_router_timeout": Alias("router_request_timeout_s", takes_value=True),
    "slime_router_max_connections": Alias("router_max_connections", takes_value=True),
    "miles_router_max_connections": Alias("router_max_connections", takes_value=True),
    "router_health_failure_threshold": Alias(
        "router_health_check_failure_threshold", takes_value=True
    ),
    "slime_router_health_check_failure_threshold": Alias(
        "router_health_check_failure_threshold", takes_value=True
    ),
    "miles_router_health_check_failure_threshold": Alias(
        "router_health_check_failure_threshold", takes_value=True
    ),
    "max_weight_staleness": Alias("max_lag", takes_value=True),
    "max_seq_len": Alias("rollout_max_context_len", takes_value=True),
    "recompute_granularity": Alias("gradient_checkpointing", constant=True, takes_value=True),
}


def _names(text: str) -> Iterator[str]:
    return (word.replace("-", "_") for word in text.split())


def _table(rows: dict[str, str]) -> dict[str, str]:
    return {name: reason for reason, text in rows.items() for name in _names(text)}


WITHOUT_EFFECT: dict[str, str] = _table(
    {
        "who gets which devices, rows and weights follows from the plan (config show --plan)": """
            critic-num-nodes critic-num-gpus-per-node allgather-cp balance-data balance-by-flops
            use-distributed-post pin-rollout-manager-to-head indep-dp delay-split-train-data-by-dp
            object-store-backend mooncake-store-init-kwargs mooncake-replica-num
            p2p-transfer-num-workers p2p-transfer-timeout debug-deterministic-collective
            eval-num-gpus eval-num-gpus-per-engine""",
        "evaluation runs between steps, on the weights of the step": """
            eval-hf-dir eval-max-in-flight eval-overflow-policy eval-keep-snapshots""",
        "the run's own server stands before its engine and has the middleware": """
            use-slime-router use-miles-router""",
        "it is sglang-router's or vllm-router's; the run has a router of its own": """
            router-assignment-mode router-backend router-balance-abs-threshold
            router-balance-rel-threshold router-bucket-adjust-interval-secs router-cache-threshold
            router-cb-failure-threshold router-cb-success-threshold
            router-cb-timeout-duration-secs router-cb-window-duration-secs
            router-disable-circuit-breaker router-disable-health-check router-disable-retries
            router-dp-aware router-enable-trace router-eviction-interval-secs
            router-health-check-endpoint router-health-check-interval-secs
            router-health-check-timeout-secs router-health-success-threshold router-log-dir
            router-log-level router-max-concurrent-requests router-max-idle-secs
            router-max-payload-size router-max-tree-size router-otlp-traces-endpoint
            router-prometheus-duration-buckets router-prometheus-host router-prometheus-port
            router-queue-timeout-secs router-rate-limit-tokens-per-second router-request-id-headers
            router-retry-backoff-multiplier router-retry-initial-backoff-ms
            router-retry-jitter-factor router-retry-max-backoff-ms router-retry-max-retries
            router-shutdown-grace-period-secs router-tokenizer-cache-enable-l0
            router-tokenizer-cache-enable-l1 router-tokenizer-cache-l0-max-entries
            router-tokenizer-cache-l1-max-memory router-worker-startup-check-interval
            router-worker-startup-timeout-secs""",
        "mode colocated does it by itself; else use offload_train and offload_rollout": """
            offload""",
        "weights, rows and memory go ways of the run (weight_transport, offload_train)": """
            offload-rollout-level offload-train-target
            update-weight-transport
            update-weight-transfer-mode train-memory-margin-bytes optimizer-cpu-offload
            overlap-cpu-optimizer-d2h-h2d use-precision-aware-optimizer recompute-method
            recompute-num-layers recompute-loss-function log-probs-chunk-size
            log-probs-max-tokens-per-gpu rollout-data-transport offload-train-disk-dir
            offload-train-disk-chunk-mb stream-optimizer-state-to-disk low-memory-resume
            rematerialize-param-from-master-weight""",
        "micro-batches are always packed under max_tokens_per_gpu": """
            use-dynamic-batch-size data-pad-size-multiplier""",
        "the model's shape comes from hf_checkpoint": """
            swiglu num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels
            use-rotary-position-embeddings disable-bias-linear add-qkv-bias normalization
            norm-epsilon rotary-base rotary-percent group-query-attention num-query-groups
            vocab-size padded-vocab-size make-vocab-size-divisible-by qk-layernorm
            untie-embeddings-and-output-weights position-embedding-type max-position-embeddings
            seq-length model-name megatron-to-hf-mode""",
        "gradients accumulate and attention is computed in float32 here": """
            accumulate-allreduce-grads-in-fp32 attention-softmax-in-fp32 attention-backend
            qkv-format linear-attention-backend dsa-attention-backend miles-dsa-topk-backend""",
        "supervised runs compute no advantages (loss_type sft_loss)": """
            disable-compute-advantages-and-returns""",
        "metrics of this run are the same without it": """
            log-multi-turn disable-wandb-random-suffix wandb-always-use-train-step ci-test
            ci-disable-kl-checker ci-train-rollout-logprob-abs-diff-threshold wandb-dir
            ci-disable-logprobs-checker ci-disable-weight-update-checker mfu-peak-tflops env-report
            observe-training-entropy""",
        "sessions of agents are served by the run's own router, at router_host and router_port": """
            use-session-server session-server-ip session-server-port""",
        "sessions go by the model's own chat template; see session_history": """
            tito-model""",
        "engines of rollout_external_engine_addrs are used when there are any": """
            rollout-external""",
    }
)

UNSUPPORTED: dict[str, str] = _table(
    {
        "further off-policy corrections and ways of going on during rollouts": """
            keep-old-actor fully-async
            use-rollout-entropy true-on-policy-mode use-indexer-replay
            use-rollout-indexer-replay recompute-logprobs-via-prefill pause-generation-mode
            rollout-submission-granularity""",
        "reference updates and other optimizers": """
            ref-update-interval ref-ckpt-step reset-optimizer-states
            use-stateless-adam lr-warmup-fraction lr-wsd-decay-style skip-actor-forward-only""",
        "further settings of on-policy distillation": """
            opd-teacher-ckpt-step opd-log-prob-top-k opd-teacher-key opd-top-k-strategy
            opd-reward-weight-mode opd-topk-per-position""",
        "further kinds of LoRA, and partly frozen models": """
            lora-type exclude-modules
            lora-adapter-path only-train-params-name-list freeze-params-name-list freeze-indexer
            mtp-num-layers mtp-loss-scaling-factor enable-mtp-training lora-sync-from-tensor
            lora-base-cpu-backup lora-train-only experts-shared-outer-loras check-lora-weight-equal
            multi-lora-n-adapters multi-lora-adapter multi-lora-idle-poll-s multi-lora-backend-path
            multi-lora-http-server-path multi-lora-api-port multi-lora-disable-service-mode
            multi-lora-max-adapter-global-batch-size multi-lora-max-coalesce-wait-s
            multi-lora-max-empty-wait-s no-sglang-lora-use-virtual-experts""",
        "further ways of serving, updating and repairing engines and trainers": """
            prefill-num-servers http-proxy release-train
            update-weight-disk-keep-files update-weight-delta-encoding update-weight-delta-checksum
            update-weight-local-checkpoint-dir
            rollout-buffer-url fetch-trajectory-retry-times min-batch-collection-ratio
            rollout-task-type ft-components control-server-port mini-ft-controller-enable
            mini-ft-controller-poll-interval mini-ft-controller-resume-delay""",
        "steps of another size": """
            allow-partial-train-step disable-rollout-trim-samples use-dynamic-global-batch-size""",
        "further settings of data": """
            start-rollout-id disable-rollout-global-dataset loss-mask-type chat-template-path""",
        "parts of checkpoints": """
            no-save-optim no-load-optim no-load-rng ckpt-step save-trigger-sentinel""",
        "other precisions, optimizers and trainers": """
            fp16 fp8-format megatron-config-path train-env-vars qwen-gdn-backend
            megatron-deepgemm-forward-layers megatron-deepgemm-forward-modules
            megatron-deepgemm-moe-forward-layers megatron-deepgemm-moe-forward-modules
            extra-high-precision-layers-hf extra-high-precision-layers-megatron
            stream-optimizer-state-moment-dtype""",
        "further tracking and debugging": """
            wandb-key wandb-host wandb-team wandb-run-id tb-project-name log-reward-category
            log-correct-samples tb-experiment-name load-forge-rollout-data
            load-debug-rollout-data-subsample save-debug-train-data dump-details memory-snapshot-dir
            memory-snapshot-num-steps profile-target memory-recorder record-memory-history
            check-weight-update-selector check-weight-update-skip-list
            check-weight-update-allow-quant-error save-local-weight-checksum ci-save-grad-norm
            ci-load-grad-norm ci-ft-test-actions ci-inject-rollout-data-path ci-metric-checker-key
            ci-metric-checker-threshold ci-save-model-hash ci-check-model-hash use-mlflow
            mlflow-tracking-uri mlflow-experiment-name mlflow-run-name mlflow-run-id use-prometheus
            prometheus-port prometheus-run-name use-miles-dashboard save-debug-trajectory-data
            save-debug-event-data enable-event-analyzer enable-witness witness-buffer-size
            dumper-enable dumper-dir dumper-inference dumper-fwd-only dumper-fwd-bwd
            dumper-source-patcher-config-inference dumper-source-patcher-config-train
            debug-exit-after-rollout debug-skip-weight-update debug-disable-optimizer""",
    }
)

FIXED: dict[str, tuple[str, ...]] = {
    "optimizer": ("adam", "adamw"),
    "attention_dropout": ("0", "0.0"),
    "hidden_dropout": ("0", "0.0"),
}
"""Foreign settings that have one value here; naming that value is fine."""

INSTEAD: dict[str, str] = {
    "train_iters": "num_rollout",
    "train_samples": "num_rollout",
    "lr_warmup_fraction": "lr_warmup_iters",
    "wandb_team": "wandb_group",
    "tb_project_name": "run_dir",
    "dump_details": "save_debug_rollout_data",
    "tb_experiment_name": "run_name",
}
"""What to use here for a foreign setting of another meaning."""

MEANT: dict[str, str] = {
    "port": "router_port",
    "host": "router_host",
    "api_key": "router_token_env",
    "router_api_key": "router_token_env",
    "model": "hf_checkpoint",
    "model_path": "hf_checkpoint",
    "engine": "rollout_engine",
    "max_model_len": "rollout_max_context_len",
    "context_length": "rollout_max_context_len",
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "tp": "sglang_tp_size",
    "tp_size": "sglang_tp_size",
    "mem_fraction_static": "sglang_mem_fraction_static",
}
"""What those mean who type flags of vLLM's and SGLang's servers; elsewhere they may mean something
else, so it is a guess for the message, no alias."""

HOW: dict[str, str] = {
    "fully_async": "use --max-lag N instead: generation goes on during training",
}
"""How to have what an unsupported setting is for, when no one setting of ours does it."""


def unsupported(name: str) -> str | None:
    """Why a known foreign name can't be used here, with what to use instead; None: not known."""
    flag = "--" + name.replace("_", "-")
    instead = INSTEAD.get(name)
    hint = f"; use --{instead.replace('_', '-')} instead" if instead else ""
    if name in HOW:
        hint = f"; {HOW[name]}"
    if name in UNSUPPORTED:
        return (
            f"{flag} is a flag of the slime family that this version does not support yet "
            f"({UNSUPPORTED[name]}){hint or '; leave it out'}"
        )
    return f"{flag} is Megatron's and means something else here{hint}" if instead else None
