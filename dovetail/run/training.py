"""The training side of a run: samples to rows, and the trainer, with the user's functions in their
places."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from dovetail.algorithms.table import CUSTOM_LOSS, DISTILLATION_LOSS
from dovetail.batch.convert import rows_from_samples
from dovetail.run.schedule import Schedule
from dovetail.trainers.critic import Critic
from dovetail.trainers.hooks import ADVANTAGE, CORRECTION, LOSS, POSTPROCESS, REDUCER, TrainHooks
from dovetail.trainers.torch.backend import TorchBackend
from dovetail.trainers.torch.teacher import Teacher
from dovetail.trainers.trainer import Trainer

if TYPE_CHECKING:
    from dovetail.config.run import RunConfig
    from dovetail.hooks import ArgsView, BoundHook
    from dovetail.run.models import Models
    from dovetail.trainers.backend import Backend
    from dovetail.trainers.data_parallel import DataParallel
    from dovetail.trainers.torch.scored_model import ScoredModel

MEGATRON_SLOTS = (
    "custom_megatron_init",
    "custom_megatron_before_log_prob_hook",
    "custom_megatron_before_train_step_hook",
    "custom_model_provider",
)
TRAINING_SLOTS = (ADVANTAGE, POSTPROCESS, LOSS, CORRECTION, REDUCER, *MEGATRON_SLOTS)
"""Of the user's functions that run wherever the policy is trained."""
Report = Callable[[int, int], None]
"""`(rows done, rows in all)`."""


class TrainerParts(Protocol):
    """What a trainer is made of: a run's parts, or those of one of its ranks."""

    config: RunConfig
    args: ArgsView
    hooks: dict[str, BoundHook]
    models: Models

    @property
    def passthrough(self) -> Mapping[str, Any]:
        """Settings that are handed through."""
        ...

    @property
    def parallel(self) -> DataParallel: ...


class RowParts(Protocol):
    """What makes rows of samples."""

    config: RunConfig
    hooks: dict[str, BoundHook]


def make_trainer(parts: TrainerParts, schedule: Schedule, report: Report) -> Trainer | None:
    """What changes the policy; None under --debug-rollout-only."""
    config = parts.config
    if config.debug.debug_rollout_only:
        return None
    teacher = parts.models.teacher
    made = None if teacher is None else make_teacher(parts, teacher)
    hooks = make_hooks(parts)
    on_logits = hooks.logits_loss is not None or config.algorithm.loss_type == DISTILLATION_LOSS
    temperature = 1.0 if config.is_sft else config.rollout.rollout_temperature
    others = [made.scored] if made and on_logits else []
    backend = _backend(parts, temperature, policy_steps(config, schedule), others)
    return Trainer(
        backend,
        config.algorithm,
        temperature=temperature,
        pad_token_id=parts.models.tokenizer.pad_token_id or 0,
        max_nonfinite_steps=config.optimizer.max_nonfinite_steps,
        samples_per_optimizer_step=config.samples_per_optimizer_step,
        loss_divisor=config.rollout.rollout_max_response_len,
        critic=make_critic(parts, schedule),
        num_critic_only_steps=config.critic.num_critic_only_steps,
        teacher=made,
        report=report,
        hooks=hooks,
    )


def _backend(
    parts: TrainerParts, temperature: float, total_steps: int, others: list[ScoredModel]
) -> Backend:
    config = parts.config
    if config.trainer.train_backend == "megatron":
        from dovetail.run.megatron import make_megatron

        return make_megatron(parts, temperature, total_steps)
    return TorchBackend(
        parts.models.model,
        parts.models.reference,
        config.batch,
        config.optimizer,
        temperature=temperature,
        total_steps=total_steps,
        routing_replay=config.algorithm.routing_replay,
        others=others,
        parallel=parts.parallel,
        gather_bytes=config.engine.update_weight_buffer_size,
    )


def policy_steps(config: RunConfig, schedule: Schedule) -> int:
    """Optimizer steps of the policy, which rests while the critic learns alone."""
    steps = max(schedule.num_steps - config.critic.num_critic_only_steps, 1)
    return steps * schedule.optimizer_steps_per_step


def make_critic(parts: TrainerParts, schedule: Schedule) -> Critic | None:
    """What learns the values of states, where the estimator asks for them."""
    config, model = parts.config, parts.models.critic
    if model is None:
        return None
    own = config.critic
    rate = config.optimizer.lr if own.critic_lr is None else own.critic_lr
    optimizer = config.optimizer.model_copy(
        update={
            "lr": rate,
            "min_lr": min(rate, config.optimizer.min_lr),
            "lr_warmup_iters": own.critic_lr_warmup_iters,
        }
    )
    return Critic(
        model,
        config.batch,
        optimizer,
        value_clip=own.value_clip,
        pad_token_id=parts.models.tokenizer.pad_token_id or 0,
        total_optimizer_steps=schedule.total_optimizer_steps,
        head_from=own.critic_load,
    )


def export_critic(parts: TrainerParts, trainer: Trainer | None) -> None:
    """Write the trained critic where critic_save says."""
    path = parts.config.critic.critic_save
    if path is not None and trainer is not None and trainer.critic is not None:
        trainer.critic.export(parts.models.tokenizer, path)


def make_teacher(parts: TrainerParts, model: Any) -> Teacher:
    """What says how probable a teacher finds the policy's tokens."""
    config = parts.config
    return Teacher(
        model,
        config.batch,
        temperature=config.rollout.rollout_temperature,
        pad_token_id=parts.models.tokenizer.pad_token_id or 0,
    )


def make_hooks(parts: TrainerParts) -> TrainHooks:
    """The user's functions inside training, as far as the settings ask for them."""
    bound, algorithm = parts.hooks, parts.config.algorithm
    loss = bound.get(LOSS) if algorithm.loss_type == CUSTOM_LOSS else None
    on_logits = loss is not None and "logits" in loss.form.positional
    return TrainHooks(
        advantage=bound.get(ADVANTAGE),
        postprocess=bound.get(POSTPROCESS),
        loss=None if on_logits else loss,
        logits_loss=loss if on_logits else None,
        correction=bound.get(CORRECTION),
        reducer=bound.get(REDUCER),
        args=parts.args,
    )


def make_to_rows(parts: RowParts) -> Callable[..., list[Any]]:
    """From samples to rows of the training batch."""
    return functools.partial(
        rows_from_samples,
        reward_key=parts.config.reward.reward_key,
        needs_reward=not parts.config.is_sft,
        post_process=parts.hooks.get("custom_reward_post_process"),
        convert=parts.hooks.get("custom_convert_samples_to_train_data"),
    )
