"""The whole configuration of a run: one frozen tree of the sections."""

from __future__ import annotations

from dovetail.config.sections import (
    AlgorithmConfig,
    BatchConfig,
    CheckpointConfig,
    CriticConfig,
    DataConfig,
    DebugConfig,
    DistillationConfig,
    EngineConfig,
    EvalConfig,
    HooksConfig,
    ModelConfig,
    ObserveConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    RouterConfig,
    RuntimeConfig,
    Section,
    SessionConfig,
    TrainerConfig,
)


class RunConfig(Section):
    """A resolved run. Nothing writes to it after it is resolved; derived values are properties."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    engine: EngineConfig = EngineConfig()
    router: RouterConfig = RouterConfig()
    session: SessionConfig = SessionConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig = CriticConfig()
    distillation: DistillationConfig = DistillationConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    observe: ObserveConfig = ObserveConfig()
    debug: DebugConfig = DebugConfig()
    hooks: HooksConfig = HooksConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def samples_per_rollout(self) -> int:
        """Samples of one step before any fan-out."""
        return self.rollout.rollout_batch_size * self.rollout.n_samples_per_prompt

    @property
    def samples_per_optimizer_step(self) -> int:
        """`global_batch_size`, or what `num_steps_per_rollout` gives, or the whole rollout."""
        if self.batch.global_batch_size is not None:
            return self.batch.global_batch_size
        return self.samples_per_rollout // (self.batch.num_steps_per_rollout or 1)

    @property
    def is_sft(self) -> bool:
        """Whether responses come from the data (`sft_loss`) instead of an engine."""
        return self.algorithm.loss_type == "sft_loss"

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained beside the policy."""
        return self.algorithm.advantage_estimator == "ppo" and self.algorithm.estimates

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher's logprobs are needed."""
        own = self.algorithm
        penalty = own.use_opd or own.advantage_estimator == "on_policy_distillation"
        return own.loss_type == "distillation_loss" or (penalty and own.estimates)

    @property
    def collects_ahead(self) -> bool:
        """Whether samples are made while the trainer trains."""
        makes = not (self.is_sft or self.train_only or self.debug.debug_rollout_only)
        return self.rollout.max_lag > 0 and makes

    @property
    def train_only(self) -> bool:
        """Whether saved samples are trained on and nothing is generated."""
        return self.debug.debug_train_only or self.debug.load_debug_rollout_data is not None
