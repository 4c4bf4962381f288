"""What each slot gets and gives: frozen records that cross the seams between stages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from dovetail.types.sample import Group, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from dovetail.types.media import Media
    from dovetail.types.ports import DataSource, Engine, Scorer, Tokenizer


class FinishReason(StrEnum):
    """Why a response ended. The spelling is that of the SGLang and OpenAI wire formats."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen.

    The logprob that an engine reports for a sampled token is `log_softmax(logits / temperature)` at
    that token, before top-k, top-p and min-p cut the distribution; at temperature 0 (greedy) it is
    `log_softmax(logits)`. The trainer uses the same convention.
    """

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """At most this many candidates; -1 keeps all."""
    min_p: float = 0.0
    """Drop candidates less probable than this fraction of the most probable one."""
    stop: tuple[str, ...] = ()
    """The response ends with the token that completes one of these strings (the token is kept)."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = False
    seed: int | None = None
    """With a seed, the draw for response position i depends on (seed, i) alone, not on the
    batch."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Token ids in. `prompt_ids` may end with the first `num_generated` tokens of an unfinished
    response."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    num_generated: int = 0
    """How many trailing ids of `prompt_ids` are response already generated (partial rollout). They
    count as positions for the seed and for `min_new_tokens`, not for `max_new_tokens`."""
    return_routed_experts: bool = False
    """Record which experts of a mixture-of-experts model each token went to."""
    media: Media | None = None
    """The images of the prompt, as the model reads them; `prompt_ids` has their tokens."""
    session_id: str | None = None
    """Requests of one session go to one engine where the router's policy is by session."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `[start, end)` of this response segment were sampled under `weight_version`."""

    weight_version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """Token ids out: what was generated in this call (not what the request brought along)."""

    request_id: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    text: str = ""
    """Decoded `token_ids`."""
    version_spans: tuple[VersionSpan, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were shared instead of computed again."""
    routed_experts: Any = None
    """[prompt + response - 1, MoE layers, top_k] int32; None where the request did not ask. The
    last token was not fed to the model yet."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Token ids whose logprobs are wanted; nothing is generated."""

    request_id: str
    token_ids: tuple[int, ...]
    start: int = 1
    """The first token that is scored; before the one at 0 there is nothing to predict it from."""
    temperature: float = 1.0
    top: int = 0
    """How many of the most probable tokens are wanted at each scored place."""


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """`log_softmax(logits / temperature)` at each of `token_ids[start:]`."""

    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    """Token ids with their logprobs at each scored place, most probable first."""
    weight_version: int = 0


def _never() -> bool:
    return False


@dataclass(frozen=True)
class GenerateCall:
    """What a generate function gets: one sample to answer, and the means to do so.

    It also has the attributes of miles' `GenerateFnInput`: `state`, `args`, `sampling_params`.

    Example:
        >>> async def generate(call):
        ...     return await call.default(call.sample, call.sampling)
    """

    sample: Sample
    sampling: SamplingParams
    """Its seed is the sample's own."""
    engine: Engine
    tokenizer: Tokenizer
    default: Callable[[Sample, SamplingParams], Awaitable[Sample]]
    """The built-in generate function."""
    evaluation: bool = False
    args: Any = None
    """Flat view over the configuration."""
    is_aborted: Callable[[], bool] = _never
    processor: Any = None

    @property
    def aborted(self) -> bool:
        """True once the step has enough groups: finish early, with status ABORTED."""
        return self.is_aborted()

    @property
    def state(self) -> GenerateCall:
        """What miles' plugins read of their state: args, tokenizer, processor, aborted."""
        return self

    @property
    def sampling_params(self) -> dict[str, Any]:
        """`sampling` as a fresh dict under the slime family's keys."""
        return {
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            "min_p": self.sampling.min_p,
            "max_new_tokens": self.sampling.max_new_tokens,
            "min_new_tokens": self.sampling.min_new_tokens,
            "stop": list(self.sampling.stop) or None,
            "stop_token_ids": list(self.sampling.stop_token_ids) or None,
            "skip_special_tokens": self.sampling.skip_special_tokens,
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
            "sampling_seed": self.sampling.seed,
        }


RUNNING_CALL: ContextVar[GenerateCall | None] = ContextVar("RUNNING_CALL", default=None)
"""In the task of a user's generate function: what it was called with. Foreign state objects, which
it makes for itself, find the run's tokenizer and its abort here."""


@dataclass(frozen=True)
class RolloutCall:
    """What a rollout or evaluation function gets: which step, and the parts the default one uses.

    Example:
        >>> async def rollout(call):
        ...     output = await call.default(call.rollout_id)
        ...     output.metrics["rollout/mine"] = 1.0
        ...     return output
    """

    rollout_id: int
    evaluation: bool = False
    data_source: DataSource | None = None
    engine: Engine | None = None
    tokenizer: Tokenizer | None = None
    scorer: Scorer | None = None
    default: Callable[[int], Awaitable[Any]] | None = None
    """The built-in function of this slot, taking the rollout id."""
    args: Any = None
    """Flat view over the configuration."""
    weight_version: int | None = None
    processor: Any = None
    """The model's, where prompts have images."""


RUNNING_ROLLOUT: ContextVar[RolloutCall | None] = ContextVar("RUNNING_ROLLOUT", default=None)
"""As RUNNING_CALL, in and below a user's rollout or evaluation function."""


@dataclass(slots=True)
class RolloutOutput:
    """What a rollout function gives for one step: groups of finished samples, and metrics."""

    samples: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class EvalOutput:
    """Samples of each evaluation set by name, in dataset order, and metrics to log."""

    data: dict[str, list[Sample]]
    metrics: dict[str, float] = field(default_factory=dict)
    columns: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """Of each set `rewards`, `truncated` and `samples`, as far as they are known."""


@dataclass(slots=True)
class DynamicFilterOutput:
    """A dynamic sampling filter's verdict on one finished group."""

    keep: bool
    reason: str | None = None
    """Named in the metric `rollout/dynamic_filter/drop_{reason}` when the group is dropped."""
    keep_when_insufficient: bool = False
    """Keep it after all if dropping it would force another round of sampling (slime)."""


@dataclass(frozen=True)
class DataSourceCall:
    """What a factory of data sources gets, once, before the first step.

    Example:
        >>> def source(call):
        ...     inner = call.default()
        ...     return Sorted(inner)
    """

    args: Any = None
    """Flat view over the configuration."""
    default: Callable[[], DataSource] | None = None
    """Makes the built-in source over `prompt_data`."""
    tokenizer: Tokenizer | None = None
    config: Any = None
    """The configuration's data section."""
    processor: Any = None
    """The model's, where prompts have images."""


MAKING_SOURCE: ContextVar[DataSourceCall | None] = ContextVar("MAKING_SOURCE", default=None)
"""As RUNNING_CALL, while a user's data source is made."""


@dataclass(frozen=True)
class LossCall:
    """What a loss function gets: one micro-batch. Lists have one entry per sample.

    Logprob-like entries, advantages and masks are [response_length] tensors.
    """

    logprobs: list[Tensor]
    """Of the policy as it is now, with gradient."""
    old_logprobs: list[Tensor]
    advantages: list[Tensor]
    loss_masks: list[Tensor]
    entropy: list[Tensor] | None = None
    ref_logprobs: list[Tensor] | None = None
    rollout_logprobs: list[Tensor] | None = None
    rewards: list[float] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    """`Sample.metadata`."""
    train_metadata: list[dict[str, Any] | None] = field(default_factory=list)
    """`Sample.train_metadata`."""
    data: dict[str, list[Any]] = field(default_factory=dict)
    """Every key of the training data, also those that only a custom conversion made."""
    args: Any = None
    """Flat view over the configuration."""
    reduce: Callable[..., Tensor] | None = None
    """Per-token values (a list as above, or one flat tensor) to a scalar: the sum over rollouts of
    their token means."""


@dataclass(frozen=True)
class CorrectionCall:
    """What a correction of off-policy samples gets: one micro-batch. Lists have one entry per
    sample.
    """

    pg_loss: Tensor
    """Policy loss per response token, samples one after the other."""
    train_log_probs: list[Tensor]
    """The trainer's, before this step's updates."""
    rollout_log_probs: list[Tensor]
    """The engine's, when the tokens were sampled."""
    loss_masks: list[Tensor]
    total_lengths: list[int]
    response_lengths: list[int]
    args: Any = None
    """Flat view over the configuration."""
    parallel_state: Any = None
    max_seq_lens: list[int] | None = None


@dataclass(frozen=True)
class ReducerCall:
    """What a factory of reducers for the policy loss gets: one micro-batch."""

    total_lengths: list[int]
    response_lengths: list[int]
    loss_masks: list[Tensor]
    """As a correction left them."""
    per_token: bool
    """calculate_per_token_loss: a mean over tokens instead of rollouts."""
