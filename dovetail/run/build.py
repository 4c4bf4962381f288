"""From a resolved configuration to living parts: the only file that chooses classes.

    checks -> hooks -> placement -> run directory -> data -> schedule -> model -> engine -> trainer

The order is that of cost: whatever can be wrong in a second is found before anything takes a
minute.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Awaitable, Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dovetail.batch.rows import rows_from_samples
from dovetail.checkpoint import hf
from dovetail.checkpoint.manager import CheckpointManager
from dovetail.checkpoint.rng import seed_all
from dovetail.config.eval_sets import eval_sets
from dovetail.config.leaves import cure
from dovetail.config.resolve import Resolved
from dovetail.config.run import RunConfig
from dovetail.data.build import build_source
from dovetail.data.source import PromptDataSource
from dovetail.engines.table import ENGINES
from dovetail.hooks import ArgsView, BoundHook, bind, bind_hooks
from dovetail.observe.log import open_log
from dovetail.observe.run_dir import RunDir
from dovetail.observe.tracker import check_trackers
from dovetail.rewards.score import Scorer
from dovetail.rollout.evaluate import EvalSet, Evaluation
from dovetail.rollout.rollout import Rollout
from dovetail.rollout.sft import SftRollout
from dovetail.run.held_out import load_eval_sets
from dovetail.run.interrupt import Interrupt
from dovetail.run.parts import Collect, Evaluate, Run
from dovetail.run.replay import Replay
from dovetail.run.report import Reporter, tracker_names
from dovetail.run.schedule import Schedule, make_schedule
from dovetail.run.validate import validate
from dovetail.runtime.compute import compute_thread
from dovetail.runtime.plan import Plan, plan
from dovetail.trainers.trainer import Trainer
from dovetail.types import CheckpointError, ConfigError, RolloutCall

_MAX_RUNNING = 256
"""Sequences decoded at once when engine_max_running is 0: more only lengthens the wait for the
first.
"""
_UNLIMITED = 1 << 20
"""Context of a model that names no limit."""


def build(resolved: Resolved) -> Run:
    """Every part of a training run.

    Raises:
        DovetailError: the configuration, a hook, the data or the model is at fault. Nothing was
        started.
    """
    config = resolved.config
    validate(config)
    if config.checkpoint.save_hf is not None:
        hf.check_export_path(config.checkpoint.save_hf)
    # No run directory yet, so no log file: what is worth a warning goes to the terminal.
    with open_log(None):
        parts = Parts(config)
        prompts_per_epoch = len(parts.source) if parts.source is not None else 0
        schedule = make_schedule(config, prompts_per_epoch, parts.replay)
        parts.load()
    check_trackers(tracker_names(config.observe))
    run_dir = _run_dir(config)
    reporter = Reporter(resolved, run_dir, schedule.num_steps)
    return Run(
        config=config,
        schedule=schedule,
        run_dir=run_dir,
        reporter=reporter,
        checkpoints=CheckpointManager(
            Path(config.checkpoint.save or run_dir.checkpoints), config.checkpoint.save_keep
        ),
        interrupt=Interrupt(),
        collect=parts.collect(reporter),
        evaluator=parts.evaluator(reporter),
        trainer=parts.trainer(schedule, reporter),
        to_rows=parts.to_rows(),
        compute=parts.compute,
        source=parts.source,
        scorer=parts.scorer if parts.samples else None,
        engines=[parts.engine] if parts.samples else [],
        export=functools.partial(hf.save_hf, parts.model, parts.tokenizer),
    )


def _run_dir(config: RunConfig) -> RunDir:
    """The one asked for; without a wish, a resumed run goes on in its own."""
    wish, load = config.observe.run_dir, config.checkpoint.load
    if wish is None and load is not None and (own := RunDir.around(load)) is not None:
        wish = str(own.path)
    return RunDir.create(config.observe.run_name, wish, resuming=load is not None)


class Parts:
    """Makes each part out of the configuration when it is first asked for."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.args = ArgsView(config)
        self.hooks: dict[str, BoundHook] = bind_hooks(config.hooks, self.args)
        self.plan: Plan = plan(config.runtime, config.model, has_cuda=torch.cuda.is_available())
        self.compute = compute_thread(self.plan.num_threads)
        seed_all(config.model.seed)
        template = config.debug.load_debug_rollout_data
        self.replay = Replay(template) if template is not None else None

    def load(self) -> None:
        """Load what takes long, in order of cost."""
        if self.samples:
            self.check_lengths()
            _ = self.eval_sets, self.scorer
        _ = self.model
        if not self.config.debug.debug_rollout_only:
            _ = self.reference
        if self.samples:
            _ = self.engine

    def check_lengths(self) -> None:
        """Refuse responses that fill the model's context.

        Raises:
            ConfigError: no prompt could have a response that long.
        """
        asked = [("rollout_max_response_len", self.config.rollout.rollout_max_response_len)]
        asked += [("eval_max_response_len", one.max_response_len) for one in eval_sets(self.config)]
        for leaf, response in asked:
            if response >= self.context_len:
                raise ConfigError(
                    f"{leaf} {response} leaves no room for a prompt in the context of "
                    f"{self.context_len} tokens of {self.config.model.hf_checkpoint}; lower "
                    f"{cure(leaf)}"
                )

    @property
    def samples(self) -> bool:
        """Whether anything is sampled in this run, so that it needs an engine and rewards."""
        if self.config.train_only:
            return False
        return not self.config.is_sft or bool(eval_sets(self.config))

    @cached_property
    def tokenizer(self) -> Any:
        """Of the policy."""
        settings = self.config.model
        return hf.load_tokenizer(str(settings.hf_checkpoint), settings.trust_remote_code)

    @cached_property
    def model(self) -> Any:
        """The policy."""
        model = self._load_model(self.config.model.hf_checkpoint)
        if self.config.model.gradient_checkpointing:
            model.activation_checkpointing_enable()
        return model

    @cached_property
    def context_len(self) -> int:
        """Most tokens of prompt plus response."""
        settings = self.config.model
        own = hf.context_len(str(settings.hf_checkpoint), settings.trust_remote_code)
        limits = (own, self.config.rollout.rollout_max_context_len)
        return min((limit for limit in limits if limit), default=_UNLIMITED)

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that leaves room for a token; under SFT prompt and response together."""
        return self.context_len - (not self.config.is_sft)

    @cached_property
    def source(self) -> PromptDataSource | None:
        """Prompts, or under SFT finished samples; None when saved samples are replayed."""
        config = self.config
        if self.replay is not None:
            return None
        return build_source(
            config.data,
            config.rollout.n_samples_per_prompt,
            self.tokenizer,
            self.max_prompt_len,
            buffer_filter=self.hooks.get("buffer_filter"),
            sft=config.is_sft,
        )

    @cached_property
    def engine(self) -> Any:
        """The engine that `rollout_engine` names."""
        settings, rollout = self.config.engine, self.config.rollout
        row = next(row for row in ENGINES if row.name == settings.rollout_engine)
        module, _, name = row.path.partition(":")
        num_wanted = (rollout.over_sampling_batch_size or rollout.rollout_batch_size) * (
            rollout.n_samples_per_prompt
        )
        max_running = settings.engine_max_running or min(num_wanted, _MAX_RUNNING)
        return getattr(importlib.import_module(module), name)(
            self.model,
            self.tokenizer,
            max_running=max_running,
            kv_tokens=settings.engine_kv_tokens or self._kv_tokens(max_running),
            max_context_len=self.context_len,
            fused=settings.engine_fused,
            cuda_graphs=settings.engine_cuda_graphs,
            eos_token_ids=hf.eos_token_ids(self.model, self.tokenizer),
            worker=self.compute,
        )

    def _kv_tokens(self, max_running: int) -> int:
        """What the sequences of a step can need at once, within the memory allowed for it."""
        per_sequence = self.context_len
        longest = self.source.longest_prompt if self.source is not None else None
        if longest is not None and "custom_generate_function" not in self.hooks:
            wanted = [longest + self.config.rollout.rollout_max_response_len]
            wanted += [
                max(len(sample.tokens) for sample in one.samples) + one.sampling.max_new_tokens
                for one in self.eval_sets
            ]
            per_sequence = min(self.context_len, max(wanted))
        needed = max(self.context_len, max_running * per_sequence)
        return min(needed, _tokens_within(self.config.engine.engine_memory_gb, self.model))

    @cached_property
    def scorer(self) -> Scorer:
        """Rewards."""
        custom = self.hooks.get("custom_rm")
        return Scorer(
            self.config.reward,
            custom,
            name=custom.path if custom is not None else None,
            resolve=lambda path: bind("custom_rm", path, self.args),
            seed=self.config.data.rollout_seed,
        )

    def collect(self, reporter: Reporter) -> Collect:
        """What gives the samples of a step."""
        config = self.config
        if self.replay is not None:
            return self.replay
        assert self.source is not None
        if config.is_sft:
            return SftRollout(self.source, config.rollout.rollout_batch_size)
        default = Rollout(
            self.engine,
            self.tokenizer,
            self.source,
            self.scorer,
            config.rollout,
            seed=config.data.rollout_seed,
            generate=self.hooks.get("custom_generate_function"),
            group_filter=self.hooks.get("dynamic_sampling_filter"),
            group_rm=config.reward.group_rm,
            reward_key=config.reward.reward_key,
            max_context_len=self.context_len,
            on_progress=reporter.rollout_progress,
        )
        hook = self.hooks.get("rollout_function")
        return default if hook is None else self._by_hook(hook, default)

    def evaluator(self, reporter: Reporter) -> Evaluate | None:
        """What evaluates; None without evaluation sets and without a function of the user's."""
        hook = self.hooks.get("eval_function")
        if not self.samples or (not self.eval_sets and hook is None):
            return None
        default = Evaluation(
            self.engine,
            self.tokenizer,
            self.eval_sets,
            self.scorer,
            seed=self.config.data.rollout_seed,
            generate=self.hooks.get("custom_generate_function"),
            group_rm=self.config.reward.group_rm,
            max_context_len=self.context_len,
            log_passrate=self.config.observe.log_passrate,
            on_progress=reporter.eval_progress,
        )
        return default if hook is None else self._by_hook(hook, default, evaluation=True)

    def _by_hook(
        self, hook: BoundHook, default: Callable[[int], Awaitable[Any]], evaluation: bool = False
    ) -> Callable[[int], Awaitable[Any]]:
        """A user's rollout or evaluation function, called with the parts that the default one
        uses.
        """

        async def call(rollout_id: int) -> Any:
            given = RolloutCall(
                rollout_id,
                evaluation=evaluation,
                data_source=self.source,
                engine=self.engine,
                tokenizer=self.tokenizer,
                scorer=self.scorer,
                default=default,
                weight_version=rollout_id,
            )
            return await hook(given)

        return call

    @cached_property
    def eval_sets(self) -> list[EvalSet]:
        """The held-out sets, loaded."""
        return load_eval_sets(self.config, self.tokenizer, max_prompt_len=self.context_len - 1)

    def trainer(self, schedule: Schedule, reporter: Reporter) -> Trainer | None:
        """What changes the policy; None under --debug-rollout-only."""
        config = self.config
        if config.debug.debug_rollout_only:
            return None
        return Trainer(
            self.model,
            self.reference,
            config.algorithm,
            config.batch,
            config.optimizer,
            temperature=1.0 if config.is_sft else config.rollout.rollout_temperature,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            total_optimizer_steps=schedule.total_optimizer_steps,
            samples_per_optimizer_step=config.samples_per_optimizer_step,
            report=reporter.train_progress,
        )

    @cached_property
    def reference(self) -> Any | None:
        """The frozen policy that the KL is measured to; None where no KL is."""
        settings, algorithm = self.config.model, self.config.algorithm
        if self.config.is_sft or not (algorithm.use_kl_loss or algorithm.kl_coef):
            return None
        if settings.ref_load is None:
            return self._load_model(settings.hf_checkpoint)
        try:
            reference = self._load_model(settings.ref_load)
        except (ConfigError, CheckpointError) as error:
            raise type(error)(f"the reference of {cure('ref_load')}: {error}") from error
        own, its = (len(m.get_input_embeddings().weight) for m in (self.model, reference))
        if its < own:
            raise ConfigError(
                f"the reference {settings.ref_load} knows {its} tokens, the policy {own}; use one "
                f"with the policy's vocabulary: {cure('ref_load', 'DIR')}"
            )
        return reference

    def _load_model(self, path: str | None) -> Any:
        settings = self.config.model
        return hf.load_model(
            str(path), settings.dtype, self.plan.device, settings.trust_remote_code
        )

    def to_rows(self) -> Callable[..., list[Any]]:
        """From samples to rows of the training batch."""
        return functools.partial(
            rows_from_samples,
            reward_key=self.config.reward.reward_key,
            needs_reward=not self.config.is_sft,
            post_process=self.hooks.get("custom_reward_post_process"),
        )


def _tokens_within(memory_gb: float, model: Any) -> int:
    """Tokens whose keys and values fit into `memory_gb` GB."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    return max(1, int(memory_gb * 1e9 / per_token))
