"""The one record: a prompt and one response to it, with everything that is known about them.

Field names and meanings are those of the slime family (slime, miles, vime), whose plugins read and
set them. Records of other families are views of this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from dovetail.types.routed import extended, from_meta_info

_FINISH_TO_STATUS = {"stop": "completed", "length": "truncated", "abort": "aborted"}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass
class SpecInfo:
    """Counters of speculative decoding, summed over a sample's requests."""

    spec_accept_token_num: int = 0
    spec_draft_token_num: int = 0
    spec_verify_ct: int = 0
    completion_token_num: int = 0

    @property
    def spec_accept_rate(self) -> float:
        """Accepted draft tokens over drafted ones; 0.0 without any."""
        return _share(self.spec_accept_token_num, self.spec_draft_token_num)

    @property
    def spec_accept_length(self) -> float:
        """Tokens produced per verification; 0.0 without any."""
        return _share(self.completion_token_num, self.spec_verify_ct)

    def add(self, meta_info: Mapping[str, Any]) -> None:
        """Add one response's `meta_info`."""
        self.spec_accept_token_num += meta_info.get("spec_accept_token_num", 0)
        self.spec_draft_token_num += meta_info.get("spec_draft_token_num", 0)
        self.spec_verify_ct += meta_info.get("spec_verify_ct", 0)
        self.completion_token_num += meta_info.get("completion_tokens", 0)


@dataclass
class PrefixCacheInfo:
    """Counters of prompt tokens that an engine did not have to compute, summed over requests."""

    cached_tokens: int = 0
    total_prompt_tokens: int = 0

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Cached prompt tokens over all prompt tokens; 0.0 without any."""
        return _share(self.cached_tokens, self.total_prompt_tokens)

    def add(self, meta_info: Mapping[str, Any]) -> None:
        """Add one response's `meta_info`."""
        self.cached_tokens += meta_info.get("cached_tokens", 0)
        self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)


@dataclass(frozen=True)
class AdapterRef:
    """The LoRA adapter that a sample is made with and trains (miles)."""

    name: str
    slot: int | None = None


@dataclass(frozen=True)
class RewardSpec:
    """How one sample is scored, before the run's own reward (miles)."""

    rm_type: str | None = None
    custom_rm_path: str | None = None


@dataclass
class Sample:
    """One prompt with one response.

    Example:
        >>> sample = Sample(prompt="1+1=", tokens=[5, 6], label="2")
        >>> sample.append_response_tokens(tokens=[7], log_probs=[-0.1], text="2")
        >>> sample.response, sample.loss_mask, sample.response_length
        ('2', [1], 1)
    """

    class Status(Enum):
        """How far the response has come. ABORTED ones are resumed under partial rollout."""

        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    group_index: int | None = None
    """Counts prompts over the whole run: siblings share it."""
    index: int | None = None
    """Counts samples over the whole run; the sort key everywhere."""
    rollout_id: int | None = None
    """Training samples that one execution fanned out into share it; None: the sample stands
    alone."""
    prompt: str | list[dict[str, Any]] = ""
    """Text, or chat messages."""
    tokens: list[int] = field(default_factory=list)
    """Prompt ids, then response ids."""
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    multimodal_train_input_id: Any = None
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    response: str = ""
    response_length: int = 0
    """Response tokens, observations included."""
    label: Any = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    """[response_length] of 0 or 1; None: all 1."""
    weight_versions: list[str] = field(default_factory=list)
    """Weight version of each generated segment, in order."""
    rollout_log_probs: list[float] | None = None
    """[response_length] logprobs from the engine when sampled; 0.0 where the token was not
    sampled."""
    rollout_top_p_token_ids: list[int] | None = None
    rollout_top_p_token_offsets: list[int] | None = None
    rollout_routed_experts: Any = None
    """[len(tokens) - 1, MoE layers, top_k] int32: the experts that the engine sent each token to;
    the last one was not fed to the model."""
    remove_sample: bool = False
    """True: the sample counts in the statistics of its group but gives no gradient."""
    teacher_log_probs: list[float] | None = None
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    generate_function_path: str | None = None
    custom_rm_path: str | None = None
    train_metadata: dict[str, Any] | None = None
    """Carried to the loss."""
    session_id: str | None = None
    non_generation_time: float = 0.0
    """Seconds spent in tools and environments."""
    spec_info: SpecInfo = field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)
    routing_key: str | None = None
    adapter: Any = None
    reward_spec: Any = None
    rollout_indexer_topk: Any = None
    opd_reverse_kl: list[float] | None = None

    @property
    def prompt_length(self) -> int:
        """Prompt tokens."""
        return len(self.tokens) - self.response_length

    @property
    def effective_response_length(self) -> int:
        """Response tokens that are trained on."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    @property
    def oldest_weight_version(self) -> int | None:
        """Smallest weight version that any segment was sampled under; None before any."""
        return min((int(v) for v in self.weight_versions if v.isdigit()), default=None)

    def get_reward_value(self, args: Any) -> Any:
        """The reward, or its `args.reward_key` entry when that is set.

        Raises:
            KeyError: the reward is a dict without that key.
        """
        key = getattr(args, "reward_key", None)
        return self.reward[key] if key else self.reward  # type: ignore[index]

    def to_dict(self) -> dict[str, Any]:
        """Every attribute, ad hoc ones too, with enums and counters as plain values."""
        plain = dict(self.__dict__)
        # Some plugins assign the plain string instead of the enum.
        plain["status"] = getattr(self.status, "value", self.status)
        plain["spec_info"] = dict(self.spec_info.__dict__)
        plain["prefix_cache_info"] = dict(self.prefix_cache_info.__dict__)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sample:
        """Inverse of `to_dict`; unknown keys become attributes.

        Raises:
            ValueError: the status is none of `Sample.Status`.
        """
        data = dict(data)
        if isinstance(data.get("status"), str):
            data["status"] = cls.Status(data["status"])
        for name, kind in (("spec_info", SpecInfo), ("prefix_cache_info", PrefixCacheInfo)):
            if isinstance(data.get(name), Mapping):
                data[name] = kind(**data[name])
        known = {f.name for f in fields(cls)}
        sample = cls(**{k: v for k, v in data.items() if k in known})
        for name, value in data.items():
            if name not in known:
                setattr(sample, name, value)
        return sample

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: Sequence[int] | None = None,
        log_probs: Sequence[float] | None = None,
        trainable: bool = True,
        meta_info: Mapping[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Append sampled (`trainable`) or observed tokens and keep every aligned field aligned.

        `meta_info` is an engine's answer in SGLang form: its finish reason sets the status, its
        weight version is appended, its counters are added (all only with `update_terminal_info`).
        Without `tokens`, they and their logprobs are read from
        `meta_info["output_token_logprobs"]`.

        Raises:
            ValueError: trainable tokens without logprobs, observed tokens with them, lengths that
                differ, or logprobs after earlier response tokens that have none.
        """
        if tokens is None and meta_info is not None and "output_token_logprobs" in meta_info:
            pairs = meta_info["output_token_logprobs"]
            tokens, log_probs = [p[1] for p in pairs], [p[0] for p in pairs]
        tokens = list(tokens or ())
        self._check_append(tokens, log_probs, trainable)
        if tokens:
            self._append(tokens, list(log_probs or [0.0] * len(tokens)), trainable)
        if text is not None:
            self.response += text
        if meta_info is not None and update_terminal_info:
            self.update_from_meta_info(args, meta_info)

    def _check_append(
        self, tokens: list[int], log_probs: Sequence[float] | None, trainable: bool
    ) -> None:
        if trainable and tokens and log_probs is None:
            raise ValueError(f"{len(tokens)} trainable tokens need log_probs of the same length")
        if not trainable and log_probs is not None:
            raise ValueError("observed tokens (trainable=False) have no log_probs; leave them out")
        if log_probs is not None and len(log_probs) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens but {len(log_probs)} log_probs")
        if log_probs is not None and self.response_length and self.rollout_log_probs is None:
            raise ValueError(
                "log_probs for a sample whose first "
                f"{self.response_length} response tokens have none"
            )

    def _append(self, tokens: list[int], log_probs: list[float], trainable: bool) -> None:
        if self.loss_mask is None:
            self.loss_mask = [1] * self.response_length
        if self.rollout_log_probs is None:
            self.rollout_log_probs = [0.0] * self.response_length
        self.tokens += tokens
        self.response_length += len(tokens)
        self.loss_mask += [int(trainable)] * len(tokens)
        self.rollout_log_probs += log_probs

    def update_from_meta_info(self, args: Any, meta_info: Mapping[str, Any]) -> None:
        """Take status, weight version, experts and counters from an engine's `meta_info` (SGLang
        form) about the tokens that are there.

        Raises:
            ValueError: see `from_meta_info`.
        """
        self.spec_info.add(meta_info)
        self.prefix_cache_info.add(meta_info)
        spans = meta_info.get("weight_versions")
        if spans:
            # Weights may change under a long response: each version in it is named.
            self.weight_versions += [str(span["version"]) for span in spans]
        elif meta_info.get("weight_version") is not None:
            self.weight_versions.append(str(meta_info["weight_version"]))
        reason = meta_info.get("finish_reason")
        routed = from_meta_info(meta_info, len(self.tokens), args)
        self.rollout_routed_experts = extended(self.rollout_routed_experts, routed)
        if isinstance(reason, Mapping):
            reason = reason.get("type")
        if reason in _FINISH_TO_STATUS:
            self.status = self.Status(_FINISH_TO_STATUS[reason])

    def reset_for_retry(self) -> None:
        """Throw the response away and mark the sample to be generated again from its prompt."""
        if self.response_length:
            self.tokens = self.tokens[: -self.response_length]
        self.response, self.response_length, self.reward = "", 0, None
        self.loss_mask, self.rollout_log_probs, self.weight_versions = None, None, []
        self.rollout_routed_experts, self.teacher_log_probs = None, None
        self.remove_sample = False
        self.spec_info, self.prefix_cache_info = SpecInfo(), PrefixCacheInfo()
        self.status = self.Status.ABORTED


# Plugins write `Sample.SpecInfo`; inside the class the name would hide the type of the field.
Sample.SpecInfo = SpecInfo  # type: ignore[attr-defined]
Sample.PrefixCacheInfo = PrefixCacheInfo  # type: ignore[attr-defined]

Group = list[Sample]
"""Siblings: samples of one prompt. They share `group_index`."""
RolloutBatch = dict[str, list[Any]]
"""Training data by column; a row of every column belongs to one sample."""
