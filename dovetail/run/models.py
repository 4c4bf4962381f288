"""The models of a run, their tokenizer, and what they can hold."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from dovetail.checkpoint import hf
from dovetail.checkpoint.processor import load_processor
from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig
from dovetail.runtime.plan import Plan
from dovetail.types import CheckpointError, ConfigError

_UNLIMITED = 1 << 20
"""Context of a model that names no limit."""


class Models:
    """Loads each when it is first asked for."""

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        self.config, self.plan = config, plan

    @cached_property
    def tokenizer(self) -> Any:
        """Of the policy."""
        settings = self.config.model
        return hf.load_tokenizer(str(settings.hf_checkpoint), settings.trust_remote_code)

    @cached_property
    def processor(self) -> Any | None:
        """What reads the images of prompts; None where prompts have none."""
        settings = self.config.model
        if not self.config.data.multimodal_keys:
            return None
        return load_processor(str(settings.hf_checkpoint), settings.trust_remote_code)

    @property
    def reader(self) -> Any:
        """What turns prompts into tokens: the processor if there are images, else the tokenizer."""
        return self.tokenizer if self.processor is None else self.processor

    @cached_property
    def model(self) -> Any:
        """The policy, with adapters where they are trained instead of its weights."""
        model = self._trained(self._load_model(self.config.model.hf_checkpoint))
        if self.config.trainer.lora_rank:
            from dovetail.trainers.torch.lora import add_adapters

            add_adapters(model, self.config.trainer, self.config.model.seed)
        return model

    @cached_property
    def sampled(self) -> Any:
        """What an engine in this process decodes with: the policy itself, or a copy of it where the
        engine goes on while the policy is trained."""
        if not self.config.collects_ahead:
            return self.model
        return self._load_model(self.config.model.hf_checkpoint)

    @cached_property
    def context_len(self) -> int:
        """Most tokens of prompt plus response."""
        settings = self.config.model
        own = hf.context_len(str(settings.hf_checkpoint), settings.trust_remote_code)
        limits = (own, self.config.rollout.rollout_max_context_len)
        return min((limit for limit in limits if limit), default=_UNLIMITED)

    @cached_property
    def reference(self) -> Any | None:
        """The frozen policy that the KL is measured to; None where no KL is. The policy itself
        where it has adapters: they are off in the reference."""
        settings = self.config.model
        if not self.config.algorithm.needs_reference:
            return None
        if settings.ref_load is None and self.config.trainer.lora_rank:
            return self.model
        if settings.ref_load is None:
            return self._load_model(settings.hf_checkpoint)
        return self._other("reference", "ref_load", settings.ref_load)

    @cached_property
    def critic(self) -> Any | None:
        """What the critic starts from, a model of its own; None where there is no critic."""
        settings = self.config.critic
        if not self.config.has_critic:
            return None
        if settings.critic_load is None:
            return self._trained(self._load_model(self.config.model.hf_checkpoint))
        return self._trained(self._other("critic", "critic_load", settings.critic_load))

    @cached_property
    def teacher(self) -> Any | None:
        """The frozen teacher; None where there is none, or samples bring its logprobs."""
        path = self.config.distillation.opd_teacher_load
        if path is None or not self.config.has_teacher:
            return None
        return self._other("teacher", "opd_teacher_load", path)

    def _other(self, what: str, leaf: str, path: str) -> Any:
        """A model that reads the policy's tokens."""
        try:
            model = self._load_model(path)
        except (ConfigError, CheckpointError) as error:
            raise type(error)(f"the {what} of {cure(leaf)}: {error}") from error
        if self.processor is not None and not self._takes_images(model):
            raise ConfigError(
                f"the {what} {path} takes only text, and prompts have images (multimodal_keys); "
                f"use a vision-language model: {cure(leaf, 'DIR')}"
            )
        own, its = (self._vocabulary(m) for m in (self.model, model))
        if its < own:
            raise ConfigError(
                f"the {what} {path} knows {its} tokens, the policy {own}; use one with the "
                f"policy's vocabulary: {cure(leaf, 'DIR')}"
            )
        return model

    def _vocabulary(self, model: Any) -> int:
        return len(model.get_input_embeddings().weight)

    def _takes_images(self, model: Any) -> bool:
        return hf.takes_images(model.config)

    def _trained(self, model: Any) -> Any:
        if self.config.model.gradient_checkpointing:
            model.activation_checkpointing_enable()
        return model

    def _load_model(self, path: str | None) -> Any:
        settings = self.config.model
        return hf.load_model(
            str(path), settings.dtype, self.plan.device, settings.trust_remote_code
        )

    def tokens_within(self, memory_gb: float) -> int:
        """Tokens whose keys and values fit into `memory_gb` GB."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        own = getattr(config, "head_dim", None)
        head_dim = own or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * head_dim * self.model.dtype.itemsize
        return max(1, int(memory_gb * 1e9 / per_token))
