"""The backend on megatron-core: a model split over ranks by layer (pipeline), matrix (tensor),
sequence (context), expert and rows (data)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dovetail.batch.pack import MicroBatch
from dovetail.batch.plan import PlannedBatch, Scope
from dovetail.batch.rows import TrainRow
from dovetail.config.sections import BatchConfig, OptimizerConfig, TrainerConfig
from dovetail.trainers.backend import BatchLoss
from dovetail.trainers.megatron import FORMAT, provider, saving
from dovetail.trainers.megatron.architecture import check_supported, transformer_config
from dovetail.trainers.megatron.bridge import Weights
from dovetail.trainers.megatron.hooks import MegatronHooks
from dovetail.trainers.megatron.layout import plan_lines
from dovetail.trainers.megatron.line import Line, idle_line, line_of
from dovetail.trainers.megatron.optim import Optimizer
from dovetail.trainers.megatron.parallel import Ranks, all_ranks, join, seed_layers
from dovetail.trainers.megatron.passes import Passes
from dovetail.trainers.megatron.routing import Replay
from dovetail.trainers.memory import Stowed
from dovetail.trainers.torch.optim import StepResult
from dovetail.trainers.torch.saving import check_format
from dovetail.types.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronModel:
    """What a model is made of, on every rank alike."""

    directory: Path
    """In Hugging Face form."""
    dtype: torch.dtype = torch.bfloat16
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    passed: Mapping[str, Any] = field(default_factory=dict)
    """The user's `--megatron-*`, without prefix."""
    gradient_checkpointing: bool = False
    seed: int = 0


class MegatronBackend:
    """Satisfies `dovetail.trainers.backend.Backend`; every rank of the default process group makes
    one.

    `reference`: the frozen policy's weights, in Hugging Face form and of the policy's architecture.

    Raises:
        ConfigError: see `check_supported` and `passed.check`; or sizes that do not fit.
        CheckpointError: the weights can't be read.
    """

    def __init__(
        self,
        model: MegatronModel,
        reference: Path | None,
        batch: BatchConfig,
        optimizer: OptimizerConfig,
        *,
        temperature: float,
        total_steps: int | None,
        routing_replay: str | None = None,
        hooks: MegatronHooks | None = None,
        device: torch.device | None = None,
    ):
        self.device = device or torch.device("cpu")
        self.hf_config = AutoConfig.from_pretrained(str(model.directory), local_files_only=True)
        check_supported(self.hf_config)
        self.batch_config, self.hooks = batch, hooks or MegatronHooks()
        self.ranks: Ranks = join(
            model.trainer, self.hf_config.num_hidden_layers, model.seed, self.device
        )
        self.parallel, self.runs_ahead = self.ranks.data, True
        if self.hooks.init is not None:
            self.hooks.init()
        if self.device.type != "cuda":
            # Only where the user's function has made something answer for CUDA.
            seed_layers(model.seed)
        self.vocab_size = int(self.hf_config.vocab_size)
        frozen, config = self._build(model, model.directory)
        self.weights = Weights(config, self.hf_config, model.dtype)
        self.chunks: list[Any] = provider.with_gradients(
            config, frozen, model.trainer, model.passed
        )
        self.optimizer = Optimizer(self.chunks, optimizer, total_steps, model.dtype, model.passed)
        self.replay = self._replay(routing_replay)
        self.policy = Passes(self.chunks, self.ranks, self.vocab_size, temperature, self.replay)
        self.reference = None
        if reference is not None:
            its, _ = self._build(model, reference)
            self.reference = Passes(its, self.ranks, self.vocab_size, temperature)
        self._step = self._rollout_id = 0
        self._stowed: Stowed | None = None

    def _build(self, model: MegatronModel, directory: Path) -> tuple[list[Any], Any]:
        config = transformer_config(
            self.hf_config,
            model.trainer,
            model.dtype,
            model.passed,
            gradient_checkpointing=model.gradient_checkpointing,
            on_cpu=self.device.type == "cpu",
        )
        chunks = provider.build(config, self.hf_config, self.device, self.hooks.provider)
        Weights(config, self.hf_config, model.dtype).load(chunks, directory)
        return provider.in_low_precision(config, chunks), config

    def _replay(self, leaf: str | None) -> Replay | None:
        if leaf is None:
            return None
        if not self.policy_config.num_moe_experts:
            raise ConfigError(
                f"{leaf} can't be: the model has no experts; leave --{leaf.replace('_', '-')} "
                f"(TOML: algorithm.{leaf}) out"
            )
        return Replay(self.chunks, self.ranks, from_rollout=leaf == "use_rollout_routing_replay")

    @property
    def policy_config(self) -> Any:
        """Megatron's configuration of the policy."""
        return provider.bare(self.chunks[0]).config

    @property
    def has_reference(self) -> bool:
        return self.reference is not None

    def plan(
        self, rows: Sequence[TrainRow], chosen: Sequence[int], scope: Scope = Scope.TRAINED
    ) -> list[PlannedBatch]:
        """See `plan_lines`."""
        return plan_lines(rows, chosen, scope, self.batch_config, self.ranks, self.vocab_size)

    @contextlib.contextmanager
    def replaying(self, rows: Sequence[TrainRow], rollout_id: int = 0) -> Iterator[None]:
        """See `Backend`; the number is told to functions of the user's.

        Raises:
            TrainError: see `Replay.of`.
        """
        self._rollout_id, self._step = rollout_id, 0
        with contextlib.nullcontext() if self.replay is None else self.replay.of(rows):
            yield

    def routing_metrics(self) -> dict[str, float]:
        """See `Replay.take_metrics`."""
        return {} if self.replay is None else self.replay.take_metrics(all_ranks())

    def logprobs(
        self, batches: Iterable[MicroBatch], idle: int = 0, *, reference: bool = False
    ) -> Iterator[torch.Tensor]:
        """See `Backend`."""
        passes = self.reference if reference else self.policy
        assert passes is not None
        lines = self._lines(batches, idle)
        if not lines:
            return
        if self.hooks.before_logprobs is not None:
            for chunk in passes.chunks:
                chunk.eval()
            self.hooks.before_logprobs(passes.chunks, "ref_" if reference else "")
        found = passes.logprobs(lines)
        if self.replay is not None and not reference:
            self.replay.share(all_ranks())
        yield from (
            values for values, line in zip(found, lines, strict=True) if line.batch is not None
        )

    def accumulate(self, batches: Iterable[MicroBatch], loss: BatchLoss, idle: int = 0) -> None:
        """See `Backend`. The gradient of one step is gathered in one call."""
        lines = self._lines(batches, idle)
        self.optimizer.drop_grads()
        if self.hooks.before_step is not None:
            own = self.optimizer
            self.hooks.before_step(
                self._rollout_id, self._step, self.chunks, own.optimizer, own.schedule
            )
        self._step += 1
        if lines:
            self.policy.accumulate(lines, loss)

    def _lines(self, batches: Iterable[MicroBatch], idle: int) -> list[Line]:
        lines = [line_of(batch, self.ranks) for batch in batches]
        lines += [idle_line(self.ranks) for _ in range(idle)]
        # Interleaved stages go round in groups of as many micro-batches as there are ranks.
        missing = -len(lines) % self.ranks.pp_size if len(self.chunks) > 1 else 0
        return lines + [idle_line(self.ranks) for _ in range(missing)]

    def discard(self) -> None:
        """See `Backend`."""
        self.optimizer.drop_grads()

    def step(self) -> StepResult:
        """See `Backend`."""
        return self.optimizer.step()

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Megatron's state is saved by all ranks, see `save`."""
        raise CheckpointError("the Megatron backend saves its state by shards only")

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """See `state_dict`."""
        raise CheckpointError(
            "the checkpoint was written by the torch backend in one process; export it with "
            "dovetail convert and start from that as --hf-checkpoint (TOML: model.hf_checkpoint)"
        )

    def save(self, directory: Path, *, in_background: bool = False) -> dict[str, Any]:
        """See `Backend` and `saving`; in the background nothing is left to do."""
        saving.write_training(self.chunks, self.optimizer, directory)
        return {
            "format": FORMAT,
            "steps_done": self.optimizer.steps_done,
        }

    def has_saved(self) -> bool:
        """See `Backend`."""
        return True

    def finish_save(self) -> None:
        """See `Backend`."""

    def load(self, directory: Path, facts: Mapping[str, Any]) -> None:
        """See `Backend` and `saving`."""
        check_format(facts, FORMAT, "the Megatron backend")
        saving.read_training(self.chunks, self.optimizer, directory, facts)

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Backend`; every rank gets whole tensors."""
        return self.weights.tensors([provider.bare(chunk) for chunk in self.chunks])

    def beside_export(self) -> None:
        """See `Backend`: there are no adapters."""

    def offload(self) -> None:
        """See `Backend`."""
        if self._stowed is not None:
            return
        models = self.policy.chunks + ([] if self.reference is None else self.reference.chunks)
        kept = [one.data for chunk in models for one in provider.bare(chunk).parameters()]
        self._stowed = Stowed([*kept, *self.optimizer.tensors()], self.optimizer.gradients())

    def onload(self) -> None:
        """See `Backend`."""
        if self._stowed is not None:
            self._stowed.restore()
            self._stowed = None
