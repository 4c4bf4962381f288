"""Protocols of the seams. A station gets them in its constructor, never knowing who is behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dovetail.types.calls import GenerateRequest, GenerateResult, ScoreRequest, ScoreResult
from dovetail.types.sample import Group, Sample
from dovetail.types.weights import Snapshot

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Engine(Protocol):
    """Makes tokens. Token ids in; token ids, logprobs, finish reason and weight versions out.

    Used from one asyncio loop; many `generate` calls are in flight at once.
    """

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Generate until a stop, the length limit or an abort; an aborted request keeps its tokens.

        Raises:
            RequestTooLongError: the request can never fit; the message has the numbers.
            EngineError: the engine failed.
        """
        ...

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (None: all, waiting ones too); their `generate` returns with ABORT."""
        ...

    async def close(self) -> None:
        """Release everything. Requests in flight end with ABORT."""
        ...


@runtime_checkable
class ScoringEngine(Protocol):
    """An engine that also says how probable it finds tokens that are there already."""

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """The logprobs of a sequence's tokens.

        Raises:
            EngineError: the request is malformed, or the engine failed.
        """
        ...


@runtime_checkable
class EngineControl(Protocol):
    """What the weight publisher and the runtime need of an engine beside generation."""

    async def pause(self) -> None:
        """Finish the current decode step, then hold all requests where they are."""
        ...

    async def resume(self) -> None:
        """Go on after `pause`; keys and values of paused requests are recomputed if weights
        changed."""
        ...

    async def receive_weights(
        self, version: int, tensors: Iterable[tuple[str, torch.Tensor]] | None
    ) -> None:
        """Take new weights under their Hugging Face names. None: they already share the
        trainer's."""
        ...


@runtime_checkable
class RemoteEngine(Engine, Protocol):
    """One engine in another process, as its client sees it. Used from one asyncio loop.

    What fails because the engine can't be reached, or breaks off, is an EngineGoneError: the
    request may be sent to another one. What the engine refuses for good is an EngineError.
    """

    url: str
    """`http://host:port`, without a path."""
    dialect: str
    """What it speaks: `sglang` or `vllm`."""
    token: str | None
    """That requests to it carry (Authorization: Bearer); None: it wants none."""

    async def healthy(self, timeout_s: float) -> bool:
        """Whether it answers within that time. Never raises."""
        ...

    async def weight_version(self) -> int | None:
        """The version that it says its weights have; None: it was given none yet."""
        ...

    async def pause(self) -> None:
        """Hold every request where it is; no token is made until `resume`."""
        ...

    async def resume(self) -> None:
        """Go on after `pause`."""
        ...

    async def load_snapshot(self, snapshot: Snapshot) -> None:
        """Take these weights, forget keys and values of older ones, and say their version from then
        on. Called while paused, or before the first request.

        Raises:
            EngineError: they did not arrive whole.
        """
        ...

    async def sleep(self) -> None:
        """Give its memory (weights, keys and values) back until `wake`."""
        ...

    async def wake(self) -> None:
        """Take memory again; weights must be loaded before the next request."""
        ...


@runtime_checkable
class DataSource(Protocol):
    """Gives groups of prompts and takes back what was not used."""

    def get_samples(self, num_samples: int) -> list[Group]:
        """The next `num_samples` groups, each `n_samples_per_prompt` fresh or resumed samples."""
        ...

    def add_samples(self, samples: list[Group]) -> None:
        """Put groups back (aborted, unused); they are served before new prompts."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position, order and buffer: restoring it gives the same following groups."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Scorer(Protocol):
    """Sets `sample.reward`. A failing reward is its own matter; what it raises ends the run."""

    async def score(self, sample: Sample) -> None:
        """Score one finished sample."""
        ...

    async def score_group(self, samples: list[Sample]) -> None:
        """Score all siblings of a finished group at once."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """Takes the metrics of one step somewhere."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the pipeline uses."""

    eos_token_id: int | None
    pad_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
