"""Logprobs of tokens that are there already: a forward of the model's own modules, no generation.

Requests wait here until the driver's next turn; then all of them are taken, in batches of similar
length, right-padded: under a causal model no token sees the padding behind it. The keys and values
of generation are not touched.

Shapes: N sequences, T tokens of a piece, V vocabulary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.types.calls import ScoreRequest, ScoreResult
from dovetail.types.errors import EngineError, RequestRefusedError

_PADDED_TOKENS = 8192
_LOGITS = 1 << 26
"""Logits held at once: 256 MiB of float32."""
_MOST_TOP = 1 << 10


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request and who waits for its answer."""

    request: ScoreRequest
    future: asyncio.Future[ScoreResult]

    @property
    def abandoned(self) -> bool:
        """Nobody waits for it any more."""
        return self.future.done() or self.future.get_loop().is_closed()


class Scoring:
    """The requests to score, and the forward that scores them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._vocab_size = int(model.config.get_text_config().vocab_size)
        self.waiting: list[Waiting] = []

    def check(self, request: ScoreRequest, max_context_len: int) -> None:
        """Refuse what can't be scored.

        Raises:
            EngineError: no ids, ids of another vocabulary, too many, or a start outside of them.
        """
        ids = request.token_ids
        if not ids or min(ids) < 0 or max(ids) >= self._vocab_size or len(ids) > max_context_len:
            raise RequestRefusedError(
                f"request {request.request_id!r}: token_ids must be 1 to {max_context_len} ids in "
                f"[0, {self._vocab_size}), got {len(ids)}"
                + (f" from {min(ids)} to {max(ids)}" if ids else "")
            )
        good_top = 0 <= request.top <= min(_MOST_TOP, self._vocab_size)
        if not 1 <= request.start <= len(ids) or not good_top or request.temperature <= 0:
            raise RequestRefusedError(
                f"request {request.request_id!r}: start={request.start} of {len(ids)} ids, "
                f"top={request.top} and temperature={request.temperature} can't be"
            )

    def take(self) -> list[list[Waiting]]:
        """Everything that somebody waits for, in batches."""
        wanted = [one for one in self.waiting if not one.abandoned]
        self.waiting.clear()
        batches: list[list[Waiting]] = []
        for one in sorted(wanted, key=lambda one: len(one.request.token_ids)):
            length = len(one.request.token_ids)
            current = batches[-1] if batches else []
            fits = bool(current) and length * (len(current) + 1) <= _PADDED_TOKENS
            if fits and length <= 2 * len(current[0].request.token_ids) + 16:
                current.append(one)
            else:
                batches.append([one])
        return batches

    def fail(self, error: EngineError) -> None:
        """Tell everybody who waits."""
        for one in self.waiting:
            if not one.abandoned:
                one.future.set_exception(error)
        self.waiting.clear()

    @torch.no_grad()
    def run(self, requests: list[ScoreRequest], version: int) -> list[ScoreResult]:
        """Score a batch.

        Raises:
            EngineError: logits are not finite.
        """
        was_training = self._model.training
        self._model.eval()
        try:
            scored = list(self._pieces(requests))
        finally:
            if was_training:
                self._model.train()
        return [
            ScoreResult(
                [value for piece in scored for value in piece[row][0]],
                [top for piece in scored for top in piece[row][1]],
                version,
            )
            for row in range(len(requests))
        ]

    def _pieces(self, requests: list[ScoreRequest]) -> Iterator[list[_Scored]]:
        """Piece by piece of the sequences, what is known of each request's tokens there."""
        device = next(self._model.parameters()).device
        longest = max(len(request.token_ids) for request in requests)
        ids = torch.tensor(
            [(*r.token_ids, *[0] * (longest - len(r.token_ids))) for r in requests], device=device
        )
        # Logits at place p are those of token p + 1: the last token is not fed.
        first = min(request.start for request in requests) - 1
        most = max(16, _LOGITS // (len(requests) * self._vocab_size))
        cache = None
        place = 0
        while place < longest - 1:
            end = min(first if place < first else place + most, longest - 1)
            # A sequence in one piece keeps no keys and values.
            output = self._model(
                input_ids=ids[:, place:end],
                past_key_values=cache,
                use_cache=cache is not None or end < longest - 1,
                logits_to_keep=1 if end <= first else 0,
            )
            cache = getattr(output, "past_key_values", None)
            if end > first:
                yield [
                    _scored(request, ids[row], output.logits[row], place)
                    for row, request in enumerate(requests)
                ]
            place = end


_Scored = tuple[list[float], list[list[tuple[int, float]]]]
"""Logprobs of some tokens, and the most probable ones at their places."""


def _scored(request: ScoreRequest, ids: Tensor, logits_TV: Tensor, place: int) -> _Scored:
    """Of the tokens of one request that these logits predict."""
    begin = max(request.start - 1 - place, 0)
    end = min(len(request.token_ids) - 1 - place, len(logits_TV))
    if begin >= end:
        return [], []
    logits_TV = logits_TV[begin:end].float()
    if request.temperature != 1.0:
        logits_TV = logits_TV / request.temperature
    total_T = logits_TV.logsumexp(-1)
    if not bool(torch.isfinite(total_T).all()):
        raise EngineError(
            f"the model's logits are not finite for request {request.request_id!r}: its weights "
            "are damaged"
        )
    tokens_T = ids[place + begin + 1 : place + end + 1]
    values_T = logits_TV.gather(1, tokens_T[:, None]).squeeze(1) - total_T
    if not request.top:
        return values_T.tolist(), [[] for _ in range(end - begin)]
    top = logits_TV.topk(request.top, dim=-1)
    pairs = zip(top.indices.tolist(), (top.values - total_T[:, None]).tolist(), strict=True)
    return values_T.tolist(), [list(zip(*pair, strict=True)) for pair in pairs]
