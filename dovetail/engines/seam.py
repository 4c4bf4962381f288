"""Stop strings that begin in an earlier part of a response. A server looks at the text of one
request; here a response may come in several."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.types.calls import GenerateRequest
from dovetail.types.ports import Tokenizer

_REPLACEMENT = "\ufffd"


def stop_over_the_seam(
    request: GenerateRequest, new_ids: Sequence[int], tokenizer: Tokenizer | None
) -> int | None:
    """How many of `new_ids` belong to the response when a stop string begins before them; None
    where there is no such string.

    Args:
        new_ids: what a server generated for the request.
        tokenizer: None: nothing can be found.
    """
    sampling = request.sampling
    if not (request.num_generated and sampling.stop and tokenizer is not None):
        return None
    longest = max(len(stop) for stop in sampling.stop)
    # A character takes at most four tokens (byte fallback); some tokens decode to nothing.
    window = 4 * longest + 8
    before = request.prompt_ids[-min(window, request.num_generated) :]
    for end in range(1, min(window, len(new_ids)) + 1):
        if request.num_generated + end < sampling.min_new_tokens:
            continue
        text = tokenizer.decode([*before, *new_ids[:end]], skip_special_tokens=False)
        earlier = tokenizer.decode([*before, *new_ids[: end - 1]], skip_special_tokens=False)
        settled = len(earlier.rstrip(_REPLACEMENT))
        # Only a match that reaches past the text there was: an older one was allowed to pass.
        if any(text.find(stop, max(0, settled - len(stop) + 1)) >= 0 for stop in sampling.stop):
            return end
    return None
