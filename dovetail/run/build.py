"""From a resolved configuration to living parts.

    checks -> hooks -> placement -> run directory -> data -> schedule -> model -> engine -> trainer

The order is that of cost: whatever can be wrong in a second is found before anything takes a
minute.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.checkpoint import hf
from dovetail.checkpoint.hf_names import merged_tensors
from dovetail.checkpoint.manager import CheckpointManager, directory_of_checkpoints
from dovetail.checkpoint.rng import seed_all
from dovetail.config.eval_sets import eval_sets
from dovetail.config.leaves import cure
from dovetail.config.resolve import Resolved
from dovetail.config.run import RunConfig
from dovetail.hooks import ArgsView, BoundHook, bind, bind_hooks
from dovetail.observe.log import open_log
from dovetail.observe.run_dir import RunDir
from dovetail.observe.tracker import check_trackers
from dovetail.rewards.score import Scorer
from dovetail.rollout.evaluate import EvalSet
from dovetail.rollout.teacher import TeacherClient
from dovetail.run.embedded import MAX_RUNNING, make_embedded
from dovetail.run.engines import make_fleet, weights_of
from dovetail.run.faults import raise_if_overdue
from dovetail.run.held_out import load_eval_sets
from dovetail.run.interrupt import Interrupt
from dovetail.run.megatron import check_device
from dovetail.run.models import Models
from dovetail.run.parts import Run
from dovetail.run.policy import LocalPolicy, Policy
from dovetail.run.rehearse.plan import rehearse_hooks
from dovetail.run.replay import Replay
from dovetail.run.report import Reporter, tracker_names
from dovetail.run.rollouts import make_collecting, make_evaluator, make_source
from dovetail.run.schedule import Schedule, make_schedule, prompts_of
from dovetail.run.serving import hook_owners, make_router
from dovetail.run.training import make_to_rows, make_trainer
from dovetail.run.validate import validate, validate_cluster
from dovetail.runtime.compute import compute_thread, decode_thread, shared_out
from dovetail.runtime.machine import cluster_of
from dovetail.runtime.plan import Plan, plan
from dovetail.runtime.shape import shape_of
from dovetail.trainers.data_parallel import ALONE, DataParallel
from dovetail.trainers.torch.routing import make_replay
from dovetail.types import ConfigError
from dovetail.types.ports import DataSource

if TYPE_CHECKING:
    from dovetail.run.on_ray import OnRay


def build(resolved: Resolved) -> Run:
    """Every part of a training run.

    Raises:
        DovetailError: the configuration, a hook, the data or the model is at fault. Nothing was
        started.
    """
    config = resolved.config
    validate(config)
    validate_cluster(config)
    for leaf, place in (
        ("save_hf", config.checkpoint.save_hf),
        ("critic_save", config.critic.critic_save),
    ):
        if place is not None:
            hf.check_export_path(place, leaf)
    # No run directory yet, so no log file: what is worth a warning goes to the terminal.
    with open_log(None):
        rehearse_hooks(resolved)
        parts = Parts(resolved)
        parts.check_teacher()
        schedule = make_schedule(config, functools.partial(prompts_of, parts.source), parts.replay)
        parts.load()
    check_trackers(tracker_names(config.observe))
    run_dir = _run_dir(config)
    reporter = Reporter(resolved, run_dir, schedule.num_steps)
    checkpoints = CheckpointManager(
        Path(config.checkpoint.save or run_dir.checkpoints), config.checkpoint.save_keep
    )
    _learn_places(parts, checkpoints.directory)
    policy = _policy(parts, schedule, reporter)
    fleet = parts.fleet
    return Run(
        config=config,
        schedule=schedule,
        run_dir=run_dir,
        reporter=reporter,
        checkpoints=checkpoints,
        interrupt=Interrupt(),
        collecting=make_collecting(parts, reporter, schedule.num_steps),
        evaluator=make_evaluator(parts, reporter),
        policy=policy,
        to_rows=make_to_rows(parts),
        compute=parts.compute,
        source=parts.source,
        scorer=parts.scorer if parts.samples else None,
        teacher=parts.teacher,
        engines=[parts.engine] if parts.samples else [],
        fleet=fleet,
        named_tensors=_weights(parts),
        log_rollout=parts.hooks.get("custom_rollout_log_function"),
        log_eval=parts.hooks.get("custom_eval_rollout_log_function"),
        after_save=parts.hooks.get("custom_megatron_post_save_hook"),
        learn=parts.args.learn,
        router=parts.router,
        check_hooks=raise_if_overdue,
        close_cluster=lambda: None if parts.on_ray is None else parts.on_ray.close(),
    )


def _policy(parts: Parts, schedule: Schedule, reporter: Reporter) -> Policy | None:
    """What is trained; its processes, where it has any, are not started."""
    if parts.on_ray is not None:
        parts.on_ray.logs_in(reporter.run_dir)
        return parts.on_ray.policy(parts, schedule, raise_if_overdue)
    trainer = make_trainer(parts, schedule, reporter.train_progress)
    return None if trainer is None else LocalPolicy(trainer, parts)


def _weights(parts: Parts) -> Callable[[], Iterable[Any]] | None:
    """What engines in other processes are given; on a cluster the ranks have it."""
    if parts.fleet is None:
        ahead = parts.config.collects_ahead
        return (lambda: merged_tensors(parts.models.model)) if ahead else None
    return weights_of(parts.models) if parts.on_ray is None else lambda: iter(())


def _learn_places(parts: Parts, directory: Path) -> None:
    """Where users' data sources keep files of their own, beside the checkpoints."""
    parts.args.learn(save=str(directory))
    load = parts.config.checkpoint.load
    if load is not None:
        parts.args.learn(load=str(directory_of_checkpoints(load)))


def _run_dir(config: RunConfig) -> RunDir:
    """The one asked for; without a wish, a resumed run goes on in its own."""
    wish, load = config.observe.run_dir, config.checkpoint.load
    if wish is None and load is not None and (own := RunDir.around(load)) is not None:
        wish = str(own.path)
    return RunDir.create(config.observe.run_name, wish, resuming=load is not None)


class Parts:
    """Makes each part out of the configuration when it is first asked for."""

    def __init__(self, resolved: Resolved) -> None:
        self.config = config = resolved.config
        self.args = ArgsView(config, resolved.passthrough)
        self.hooks: dict[str, BoundHook] = bind_hooks(config.hooks, self.args, hook_owners(config))
        self._bound: dict[tuple[str, str], BoundHook] = {}
        self._bind_those_of_eval_sets()
        self.plan: Plan = plan(config, cluster_of(config), shape_of(config))
        self.passthrough = resolved.passthrough
        self.on_ray = self._on_ray()
        self.models = self._models()
        has_fleet = self.samples and not self.plan.shares_tensors
        self.fleet = (
            make_fleet(
                config,
                self.models,
                resolved.passthrough,
                self.on_ray,
                self.hooks.get("custom_update_weight_post_write"),
            )
            if has_fleet
            else None
        )
        """The engines that have processes of their own."""
        beside = config.collects_ahead and self.plan.shares_tensors
        training, self._decoding = shared_out(self.plan.num_threads)
        self.compute = compute_thread(training if beside else self.plan.num_threads)
        seed_all(config.model.seed)
        template = config.debug.load_debug_rollout_data
        self.replay = Replay(template) if template is not None else None
        self.router = make_router(self, list(self._bound.values()))

    def _on_ray(self) -> OnRay | None:
        """The cluster, in the modes that have one; nothing of it is started."""
        if self.plan.mode == "local":
            return None
        if self.config.trainer.train_backend == "megatron":
            check_device(self.plan.device, "custom_megatron_init" in self.hooks)
        from dovetail.run.on_ray import OnRay

        return OnRay(self.config, self.plan)

    def _models(self) -> Models:
        if self.on_ray is None or not self.plan.trainer_ranks:
            return Models(self.config, self.plan)
        from dovetail.run.rank_models import SkeletonModels

        return SkeletonModels(self.config, self.plan)

    @property
    def parallel(self) -> DataParallel:
        """The trainer of this process is alone."""
        return ALONE

    def bound(self, slot: str, path: str) -> BoundHook:
        """The function at `path` for `slot`, bound once: samples and sets may name their own."""
        if (slot, path) not in self._bound:
            self._bound[slot, path] = bind(slot, path, self.args)
        return self._bound[slot, path]

    def _bind_those_of_eval_sets(self) -> None:
        for one in eval_sets(self.config):
            for slot in ("custom_rm", "custom_generate_function"):
                path = getattr(one, f"{slot}_path")
                if path is not None:
                    self.bound(slot, path)

    def load(self) -> None:
        """Load what takes long, in order of cost."""
        if self.samples:
            self.check_lengths()
            _ = self.eval_sets, self.scorer
        _ = self.models.model
        self._learn_routing()
        if not self.config.debug.debug_rollout_only and self.on_ray is None:
            _ = self.models.reference, self.models.critic, self.models.teacher
        if self.samples:
            _ = self.engine

    def check_teacher(self) -> None:
        """Have the servers of the teacher answer before anything takes long; saved samples may have
        been answered for already.

        Raises:
            ConfigError: one is down, or reads another vocabulary.
        """
        if self.teacher is not None and not self.config.train_only:
            asyncio.run(self.teacher.check())

    @cached_property
    def teacher(self) -> TeacherClient | None:
        """The servers of a teacher, where there are any."""
        own = self.config.distillation
        if not (own.opd_teacher_urls and self.config.has_teacher):
            return None
        return TeacherClient.from_config(own, len(self.models.tokenizer))

    def check_lengths(self, training: bool = True) -> None:
        """Refuse responses that fill the model's context.

        Raises:
            ConfigError: no prompt could have a response that long.
        """
        asked = [("rollout_max_response_len", self.config.rollout.rollout_max_response_len)]
        asked = asked if training else []
        asked += [("eval_max_response_len", one.max_response_len) for one in eval_sets(self.config)]
        for leaf, response in asked:
            if response >= self.models.context_len:
                raise ConfigError(
                    f"{leaf} {response} leaves no room for a prompt in the context of "
                    f"{self.models.context_len} tokens of {self.config.model.hf_checkpoint}; lower "
                    f"{cure(leaf)}"
                )

    def _learn_routing(self) -> None:
        """Refuse a replay of experts on a model without; tell users' functions how many there
        are of each token.

        Raises:
            ConfigError: see `make_replay`.
        """
        leaf = self.config.algorithm.routing_replay
        if leaf is not None:
            routers = make_replay(self.models.model, leaf).routers
            self.args.learn(num_layers=len(routers), moe_router_topk=routers.top_k)

    @property
    def samples(self) -> bool:
        """Whether anything is sampled in this run, so that it needs an engine and rewards."""
        if self.config.train_only:
            return False
        return not self.config.is_sft or bool(eval_sets(self.config))

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that leaves room for a token; under SFT prompt and response together."""
        return self.models.context_len - (not self.config.is_sft)

    @cached_property
    def source(self) -> DataSource | None:
        """Prompts, or under SFT finished samples; None when saved samples are replayed, or when
        nothing is trained on."""
        return make_source(self) if self.replay is None else None

    @cached_property
    def engine(self) -> Any:
        """The engine that `rollout_engine` names: in this process, or those of the fleet as one."""
        if self.fleet is not None:
            return self.fleet.engine
        settings, rollout = self.config.engine, self.config.rollout
        num_wanted = (rollout.over_sampling_batch_size or rollout.rollout_batch_size) * (
            rollout.n_samples_per_prompt
        )
        max_running = settings.engine_max_running or min(num_wanted, MAX_RUNNING)
        return make_embedded(
            self.models,
            decode_thread(self._decoding) if self.config.collects_ahead else self.compute,
            max_running=max_running,
            kv_tokens=settings.engine_kv_tokens or self._kv_tokens(max_running),
        )

    def _kv_tokens(self, max_running: int) -> int:
        """What the sequences of a step can need at once, within the memory allowed for it."""
        per_sequence = self.models.context_len
        longest = getattr(self.source, "longest_prompt", None)
        generated_by = {*self.hooks, *(slot for slot, _ in self._bound)}
        if longest is not None and not generated_by & {"custom_generate_function", "data_source"}:
            wanted = [longest + self.config.rollout.rollout_max_response_len]
            wanted += [
                max(len(sample.tokens) for sample in one.samples) + one.sampling.max_new_tokens
                for one in self.eval_sets
            ]
            per_sequence = min(self.models.context_len, max(wanted))
        needed = max(self.models.context_len, max_running * per_sequence)
        return min(needed, self.models.tokens_within(self.config.engine.engine_memory_gb))

    @cached_property
    def scorer(self) -> Scorer:
        """Rewards."""
        custom = self.hooks.get("custom_rm")
        return Scorer(
            self.config.reward,
            custom,
            name=custom.path if custom is not None else None,
            resolve=functools.partial(self.bound, "custom_rm"),
            seed=self.config.data.rollout_seed,
            max_response_len=self.config.rollout.rollout_max_response_len,
            keeps_objects=self.reward_objects,
        )

    @property
    def reward_objects(self) -> bool:
        """Whether a function of the user's reads rewards that are objects."""
        readers = ("custom_reward_post_process", "custom_convert_samples_to_train_data")
        return any(reader in self.hooks for reader in readers)

    @cached_property
    def eval_sets(self) -> list[EvalSet]:
        """The held-out sets, loaded."""
        return load_eval_sets(
            self.config, self.models.reader, max_prompt_len=self.models.context_len - 1
        )
