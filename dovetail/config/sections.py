"""Every knob of a run, declared once: type, default, bounds, one line of help.

Flags, TOML keys, `--help`, the reference page and the checks are read from these declarations. Leaf names
are unique over the whole tree, so a flag is `--` plus the leaf name with dashes. Where the slime family has
a name for the same thing, it is the name here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen table of knobs; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    """Which model, in which precision."""

    hf_checkpoint: str | None = Field(None, description="Hugging Face model directory: weights, tokenizer, config.")
    ref_load: str | None = Field(None, description="Hugging Face directory of the frozen reference for KL; default: hf_checkpoint.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Type of the weights in forward passes; master weights are always float32.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where model and engine live; auto takes a GPU when there is one.")
    num_threads: int = Field(0, ge=0, description="CPU threads for tensor work; 0 takes all that this process may use.")
    seed: int = Field(1234, ge=0, description="Seed of everything in training that is random.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory.")


class DataConfig(Section):
    """Where prompts come from."""

    prompt_data: str | None = Field(None, description="JSONL, JSON, parquet file or datasets directory; slices as path@[a:b].")
    input_key: str = Field("input", description="Column of the prompt: text or chat messages.")
    label_key: str | None = Field(None, description="Column of the answer that the reward sees; for SFT the response to learn.")
    metadata_key: str = Field("metadata", description="Column of free metadata (an object).")
    tool_key: str = Field("tools", description="Column of tool schemas for the chat template.")
    apply_chat_template: bool = Field(False, description="Put prompts through the tokenizer's chat template.")
    apply_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="JSON object handed to the chat template.")
    rollout_max_prompt_len: int | None = Field(None, ge=1, description="Drop prompts of more tokens than this, and count them.")
    rollout_shuffle: bool = Field(False, description="New order of prompts every epoch, from (rollout_seed, epoch).")
    rollout_seed: int = Field(42, ge=0, description="Seed of prompt order and of sampling.")
    num_rollout: int | None = Field(None, ge=0, description="Steps of the run; one step is one rollout and its training.")
    num_epoch: int | None = Field(None, ge=1, description="Steps as passes over prompt_data; instead of num_rollout.")


class RolloutConfig(Section):
    """How samples are collected for one step."""

    rollout_batch_size: int = Field(8, ge=1, description="Groups (prompts) per step.")
    n_samples_per_prompt: int = Field(1, ge=1, description="Samples per prompt: the size of a group.")
    over_sampling_batch_size: int | None = Field(None, ge=1, description="Groups submitted at a time when a filter drops some; default: rollout_batch_size.")
    partial_rollout: bool = Field(False, description="Keep unfinished samples of surplus groups in the buffer and finish them in a later step.")
    mask_offpolicy_in_partial_rollout: bool = Field(False, description="Do not train on the part of a resumed sample that older weights made.")
    rollout_max_response_len: int = Field(256, ge=1, description="Most tokens of a response.")
    rollout_max_context_len: int | None = Field(None, ge=2, description="Most tokens of prompt plus response; default: what the model allows.")
    rollout_temperature: float = Field(1.0, gt=0, description="Sampling temperature; logprobs are taken under it.")
    rollout_top_p: float = Field(1.0, gt=0, le=1, description="Keep the most probable tokens that hold this mass.")
    rollout_top_k: int = Field(-1, ge=-1, description="Keep this many most probable tokens; -1 keeps all.")
    rollout_min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens below this fraction of the most probable one.")
    rollout_min_new_tokens: int = Field(0, ge=0, description="No stop before this many response tokens.")
    rollout_stop: list[str] = Field(default_factory=list, description="Strings that end a response.")
    rollout_stop_token_ids: list[int] = Field(default_factory=list, description="Token ids that end a response, beside the model's own.")
    rollout_skip_special_tokens: bool = Field(False, description="Leave special tokens out of the response text.")
    max_dropped_groups: int = Field(1000, ge=1, description="A step that drops this many groups in a row stops the run.")
    abort_grace_s: float = Field(10.0, ge=0, description="Seconds to wait for judges and tools of aborted groups.")


class EngineConfig(Section):
    """What makes the tokens."""

    rollout_engine: str = Field("embedded", description="Engine by name; embedded runs in this process on the trainer's own tensors.")
    engine_max_running: int = Field(0, ge=0, description="Most sequences decoded at once; 0: as many as a step needs, up to 256.")
    engine_kv_tokens: int = Field(0, ge=0, description="Tokens that the KV cache holds; 0: from engine_memory_gb.")
    engine_memory_gb: float = Field(2.0, gt=0, description="Memory for the KV cache when engine_kv_tokens is 0.")
    engine_fused: Literal["auto", "on", "off"] = Field("auto", description="Fused decoding for Llama/Qwen models after a check against the module's logits; on fails where auto falls back.")
    engine_cuda_graphs: bool = Field(True, description="Capture decode steps as CUDA graphs where a GPU is present.")


class RewardConfig(Section):
    """What a response is worth."""

    rm_type: str | None = Field(None, description="Built-in reward by name; a sample's metadata['rm_type'] wins.")
    rm_url: str | None = Field(None, description="Address that remote_rm posts to.")
    reward_key: str | None = Field(None, description="Entry of a dict reward that is trained on.")
    eval_reward_key: str | None = Field(None, description="Entry of a dict reward that evaluation reports; default: reward_key.")
    group_rm: bool = Field(False, description="Call the reward once with a whole group.")
    reward_timeout_s: float = Field(30.0, gt=0, description="Seconds after which a reward counts as failed.")
    reward_workers: int = Field(2, ge=1, description="Worker processes for rewards that can hang.")
    max_reward_failures: int = Field(64, ge=1, description="Failed rewards in a row that stop the run.")


class AlgorithmConfig(Section):
    """Advantage, loss and KL."""

    loss_type: str = Field("policy_loss", description="policy_loss, sft_loss, or another row of the loss table.")
    advantage_estimator: str = Field("grpo", description="Row of the advantage table.")
    grpo_std_normalization: bool = Field(True, description="Divide group-centred rewards by the group's standard deviation.")
    rewards_normalization: bool = Field(True, description="Centre rewards on their group.")
    normalize_advantages: bool = Field(False, description="Whiten advantages over all trained tokens of the step.")
    eps_clip: float = Field(0.2, ge=0, description="Lower clip of the policy ratio: 1 - eps_clip.")
    eps_clip_high: float | None = Field(None, ge=0, description="Upper clip: 1 + eps_clip_high; default: eps_clip.")
    eps_clip_c: float | None = Field(None, gt=1, description="Dual clip: bound of the ratio for negative advantages.")
    use_kl_loss: bool = Field(False, description="Add KL to the frozen reference to the loss.")
    kl_loss_coef: float = Field(0.0, ge=0, description="Weight of the KL loss.")
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = Field("k1", description="Estimator of the KL loss.")
    kl_coef: float = Field(0.0, ge=0, description="Weight of the KL penalty inside the reward.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    calculate_per_token_loss: bool = Field(False, description="Mean over tokens of the step instead of mean over samples of token means.")


class BatchConfig(Section):
    """How a step's samples become optimizer steps and micro-batches."""

    global_batch_size: int | None = Field(None, ge=1, description="Samples per optimizer step.")
    num_steps_per_rollout: int | None = Field(None, ge=1, description="Optimizer steps per rollout; gives global_batch_size.")
    max_tokens_per_gpu: int = Field(16384, ge=1, description="Token budget of a micro-batch, padding included.")
    micro_batch_size: int | None = Field(None, ge=1, description="Most samples of a micro-batch; default: only the token budget counts.")


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-6, ge=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of a decaying schedule.")
    lr_decay_style: Literal["constant", "linear", "cosine"] = Field("constant", description="Shape after warm-up.")
    lr_warmup_iters: int = Field(0, ge=0, description="Optimizer steps of linear warm-up.")
    lr_decay_iters: int | None = Field(None, ge=1, description="Optimizer steps until min_lr; default: the whole run.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta 1.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW beta 2.")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on matrices only.")
    clip_grad: float = Field(1.0, ge=0, description="Largest gradient norm; 0 does not clip.")
    max_nonfinite_steps: int = Field(10, ge=1, description="Steps in a row with non-finite gradients that stop the run.")


class CheckpointConfig(Section):
    """What is kept, and how a run goes on."""

    save: str | None = Field(None, description="Directory of checkpoints; default: checkpoints in the run directory.")
    load: str | None = Field(None, description="Resume from this checkpoint, or the newest good one in this directory.")
    save_interval: int | None = Field(None, ge=1, description="Steps between checkpoints; the last step is always saved when set.")
    save_keep: int = Field(2, ge=1, description="Newest checkpoints kept.")
    save_hf: str | None = Field(None, description="Export the policy as a Hugging Face directory at the end; {rollout_id} in it exports at every save.")


class EvalConfig(Section):
    """Named held-out sets."""

    eval_interval: int | None = Field(None, ge=1, description="Steps between evaluations.")
    eval_prompt_data: list[str] = Field(default_factory=list, description="Pairs: name path name path ...")
    eval_sets: dict[str, dict[str, Any]] = Field(default_factory=dict, description="TOML tables [eval.eval_sets.NAME] with path and own settings.")
    skip_eval_before_train: bool = Field(False, description="No evaluation before the first step.")
    n_samples_per_eval_prompt: int = Field(1, ge=1, description="Samples per evaluation prompt.")
    eval_temperature: float | None = Field(None, ge=0, description="Temperature in evaluation (0: greedy); default: rollout_temperature.")
    eval_top_p: float | None = Field(None, gt=0, le=1, description="Top-p in evaluation; default: rollout_top_p.")
    eval_top_k: int | None = Field(None, ge=-1, description="Top-k in evaluation; default: rollout_top_k.")
    eval_max_response_len: int | None = Field(None, ge=1, description="Response limit in evaluation; default: rollout_max_response_len.")
    eval_max_prompt_len: int | None = Field(None, ge=1, description="Prompt limit in evaluation; default: rollout_max_prompt_len.")
    eval_input_key: str | None = Field(None, description="Prompt column of evaluation sets; default: input_key.")
    eval_label_key: str | None = Field(None, description="Label column of evaluation sets; default: label_key.")


class ObserveConfig(Section):
    """What a person can see."""

    run_name: str = Field("run", min_length=1, pattern=r"^[\w.\-]+$", description="Name of the run; part of the default run directory.")
    run_dir: str | None = Field(None, description="Run directory; default: the first free outputs/<run_name>[-n].")
    save_samples: bool = Field(True, description="Write the samples of every step to the run directory.")
    progress: Literal["auto", "rich", "plain", "off"] = Field("auto", description="Progress bars on a terminal, plain lines otherwise.")
    log_passrate: bool = Field(True, description="Log pass@k of evaluation sets with several samples per prompt.")
    use_tensorboard: bool = Field(True, description="Write TensorBoard events to the run directory.")
    use_wandb: bool = Field(False, description="Log to Weights & Biases (extra: wandb).")
    wandb_project: str = Field("dovetail", description="Weights & Biases project.")
    wandb_group: str | None = Field(None, description="Weights & Biases group; default: run_name.")
    wandb_mode: Literal["online", "offline", "disabled"] = Field("online", description="Weights & Biases mode.")


class DebugConfig(Section):
    """Run one side without the other."""

    debug_rollout_only: bool = Field(False, description="Collect and score samples, never train.")
    debug_train_only: bool = Field(False, description="Train on saved samples, never generate; needs load_debug_rollout_data.")
    save_debug_rollout_data: str | None = Field(None, description="Write each step's samples here; {rollout_id} in the path is the step.")
    load_debug_rollout_data: str | None = Field(None, description="Train on samples saved by save_debug_rollout_data; implies debug_train_only.")


class HooksConfig(Section):
    """The user's functions: registered name, pkg.mod.attr, pkg.mod:attr or path/file.py:attr."""

    rollout_function_path: str | None = Field(None, description="Hook: collects all samples of a step.")
    eval_function_path: str | None = Field(None, description="Hook: evaluation instead of the built-in one.")
    custom_generate_function_path: str | None = Field(None, description="Hook: makes the response of one sample.")
    custom_rm_path: str | None = Field(None, description="Hook: reward.")
    dynamic_sampling_filter_path: str | None = Field(None, description="Hook: keep or drop a finished group.")
    buffer_filter_path: str | None = Field(None, description="Hook: choose groups out of the buffer.")
    custom_reward_post_process_path: str | None = Field(None, description="Hook: rewards before advantages.")


class RuntimeConfig(Section):
    """Who lives where."""

    mode: Literal["local", "colocated", "disaggregated"] = Field("local", description="local: one process, engine and trainer share tensors.")
