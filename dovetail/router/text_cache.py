"""What texts are made of: token ids, logprobs and loss mask of answered conversations, found again
by their text.

A text is cut into tokens in many ways, and an engine samples others than a tokenizer would cut. So
a client that knows texts only gets back what was sampled, and a next turn goes on from it: what is
known of its beginning is not encoded again. A radix tree over characters finds the longest known
beginning; an edge is a piece of text, and an entry stands where its text ends.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dovetail.types.ports import Tokenizer

_MAX_BYTES = 512_000_000
_KEEP_VERSIONS = 5
_MOST_HIDDEN = 16
"""Tokens at the end of a response that its text may not show: an end token, a stop string."""
_NODE_BYTES = 600
"""Of an entry beside its arrays and its text, measured."""


@dataclass(frozen=True)
class Trajectory:
    """Tokens of a prompt with everything that was answered before.

    tokens, logprobs, loss_mask: [T]; where loss_mask is 0, nothing was sampled and logprobs are 0.
    """

    tokens: list[int]
    logprobs: list[float]
    loss_mask: list[int]

    def followed(
        self, tokens: Sequence[int], logprobs: Sequence[float] | None = None
    ) -> Trajectory:
        """With more tokens: sampled ones where they have logprobs."""
        return Trajectory(
            [*self.tokens, *tokens],
            [*self.logprobs, *(logprobs or [0.0] * len(tokens))],
            [*self.loss_mask, *[int(logprobs is not None)] * len(tokens)],
        )


@dataclass(slots=True, eq=False)
class _Entry:
    tokens: array[int]
    logprobs: array[float]
    loss_mask: bytes
    chars: int
    shown: int
    """Leading tokens that make up the first `shown_chars` characters of the text, exactly."""
    shown_chars: int
    hidden: str
    """What the tokens behind those say."""
    version: int | None = None
    bytes: int = 0

    def first(self, count: int) -> Trajectory:
        """Its leading tokens."""
        return Trajectory(
            self.tokens[:count].tolist(),
            self.logprobs[:count].tolist(),
            list(self.loss_mask[:count]),
        )


@dataclass(slots=True, eq=False)
class _Node:
    edge: str
    parent: _Node | None
    children: dict[str, _Node] = field(default_factory=dict)
    entry: _Entry | None = None


class TextCache:
    """Conversations by text, within bounds.

    Args:
        tokenizer: gives the one that texts are encoded with.
        max_bytes: what is kept; what was not used for the longest time goes first.
        keep_versions: of the weights; what older ones said goes when newer ones speak.
    """

    def __init__(
        self,
        tokenizer: Callable[[], Tokenizer],
        max_bytes: int = _MAX_BYTES,
        keep_versions: int = _KEEP_VERSIONS,
    ) -> None:
        self._tokenizer, self.max_bytes, self.keep_versions = tokenizer, max_bytes, keep_versions
        self.clear()

    def __len__(self) -> int:
        return len(self._used)

    def clear(self) -> None:
        """Forget everything."""
        self._root = _Node("", None)
        self._used: OrderedDict[_Node, None] = OrderedDict()
        """Nodes with an entry, the one that was used last at the end."""
        self.bytes = 0
        self.newest_version: int | None = None

    def insert(
        self,
        text: str,
        token_ids: Sequence[int],
        logp: Sequence[float] | None = None,
        loss_mask: Sequence[int] | None = None,
        weight_version: int | str | None = None,
    ) -> bool:
        """Keep that `text` is made of these tokens; False: it is too large.

        Args:
            token_ids, logp, loss_mask: [T]; without the latter two nothing of it was sampled.
            weight_version: of what sampled the last of it; None: it does not grow old.

        Raises:
            ValueError: the lengths differ.
        """
        size = len(token_ids)
        logprobs, mask = logp or [0.0] * size, loss_mask or [0] * size
        if not size == len(logprobs) == len(mask):
            raise ValueError(f"{size} tokens have {len(logprobs)} logprobs, {len(mask)} in a mask")
        known = Trajectory(list(token_ids), list(logprobs), list(mask))
        return self._keep(text, _entry(text, known, size, len(text), "", weight_version))

    def remember(
        self,
        prompt: str,
        known: Trajectory,
        response: str,
        made: Sequence[tuple[float, int]],
        weight_version: int | str | None = None,
    ) -> bool:
        """Keep an answer; False: it is too large.

        Args:
            prompt: what was answered, and `known`, its tokens.
            response: the answer as its client sees it: the end token may be cut off.
            made: logprob and id of each of its tokens.
        """
        ids, text = [token for _, token in made], prompt + response
        count, chars, hidden = self._shown(ids, response)
        entry = _entry(
            text,
            known.followed(ids, [value for value, _ in made]),
            len(known.tokens) + count,
            len(prompt) + chars,
            hidden,
            weight_version,
        )
        return self._keep(text, entry)

    def retrieve_from_text(
        self, text: str, return_logprob: bool = True
    ) -> tuple[list[int], list[float] | None, list[int]]:
        """Token ids, logprobs and loss mask of `text`: as they were sampled as far as that is
        known, the rest encoded."""
        found = self.whole(text)
        return found.tokens, found.logprobs if return_logprob else None, found.loss_mask

    def whole(self, text: str) -> Trajectory:
        """What `text` is made of, with tokens at its end that it does not show."""
        entry = self._longest(text)
        if entry is not None and entry.chars == len(text):
            return entry.first(len(entry.tokens))
        return self._extended(entry, text)

    def prompt(self, text: str) -> Trajectory:
        """What an engine is to go on from after `text`, and no token more than that says."""
        return self._extended(self._longest(text), text)

    def of_ids(self, text: str, ids: list[int]) -> Trajectory:
        """What is known of a prompt of these ids, whose text this is."""
        entry = self._longest(text)
        for count in (len(entry.tokens), entry.shown) if entry is not None else ():
            if entry is not None and entry.tokens[:count].tolist() == ids[:count]:
                return entry.first(count).followed(ids[count:])
        return Trajectory([], [], []).followed(ids)

    def _extended(self, entry: _Entry | None, text: str) -> Trajectory:
        if entry is None:
            return Trajectory([], [], []).followed(self._tokenizer().encode(text))
        count, rest = entry.shown, text[entry.shown_chars :]
        # A template says the end token again that the answer did not show.
        if entry.hidden and rest.startswith(entry.hidden):
            count, rest = len(entry.tokens), rest[len(entry.hidden) :]
        encoded = self._tokenizer().encode(rest, add_special_tokens=False) if rest else []
        return entry.first(count).followed(encoded)

    def _shown(self, ids: list[int], text: str) -> tuple[int, int, str]:
        """How many of the tokens are in the text, its characters that they make, and what the
        others say."""
        decode, whole = self._tokenizer().decode, ""
        for count in range(len(ids), max(len(ids) - _MOST_HIDDEN, 0) - 1, -1):
            made = decode(ids[:count], skip_special_tokens=False)
            whole = whole or made
            if text.startswith(made):
                return count, len(made), whole[len(made) :]
        return 0, 0, ""

    def _longest(self, text: str) -> _Entry | None:
        node, at, best = self._root, 0, None
        while (child := node.children.get(text[at : at + 1])) is not None:
            if not text.startswith(child.edge, at):
                break
            node, at = child, at + len(child.edge)
            best = node if node.entry is not None else best
        if best is None:
            return None
        self._used.move_to_end(best)
        return best.entry

    def _keep(self, text: str, entry: _Entry) -> bool:
        if not text or entry.bytes > self.max_bytes:
            return False
        node = self._node(text)
        if node.entry is not None:
            self.bytes -= node.entry.bytes
        node.entry = entry
        self._used[node] = None
        self._used.move_to_end(node)
        self.bytes += entry.bytes
        self._grow_old(entry.version)
        while self.bytes > self.max_bytes:
            self._forget(next(iter(self._used)))
        return True

    def _grow_old(self, version: int | None) -> None:
        if version is None or (self.newest_version is not None and version <= self.newest_version):
            return
        self.newest_version = version
        for node in list(self._used):
            said = node.entry.version if node.entry is not None else None
            if said is not None and said <= version - self.keep_versions:
                self._forget(node)

    def _node(self, text: str) -> _Node:
        """The node of `text`, made where there is none."""
        node, at = self._root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                child = node.children[text[at]] = _Node(text[at:], node)
                return child
            if not text.startswith(child.edge, at):
                child = _split(child, _shared(child.edge, text, at))
            node, at = child, at + len(child.edge)
        return node

    def _forget(self, node: _Node) -> None:
        del self._used[node]
        if node.entry is not None:
            self.bytes -= node.entry.bytes
        node.entry = None
        parent = node.parent
        if not node.children and parent is not None:
            del parent.children[node.edge[0]]
            _join(parent)
        else:
            _join(node)


def _entry(
    text: str,
    known: Trajectory,
    shown: int,
    shown_chars: int,
    hidden: str,
    version: int | str | None,
) -> _Entry:
    entry = _Entry(
        array("q", known.tokens),
        array("d", known.logprobs),
        bytes(known.loss_mask),
        len(text),
        shown,
        shown_chars,
        hidden,
        int(version) if version is not None and str(version).isdecimal() else None,
    )
    entry.bytes = _NODE_BYTES + 17 * len(known.tokens) + sys.getsizeof(text)
    return entry


def _shared(edge: str, text: str, at: int) -> int:
    """How many characters `edge` and `text` from `at` on begin with alike. Long ones are compared
    whole, not one by one."""
    low, high = 0, len(edge)
    while low < high:
        middle = (low + high + 1) // 2
        if text.startswith(edge[low:middle], at + low):
            low = middle
        else:
            high = middle - 1
    return low


def _split(node: _Node, at: int) -> _Node:
    """A new node in the midst of an edge."""
    assert node.parent is not None
    upper = _Node(node.edge[:at], node.parent)
    node.parent.children[upper.edge[0]] = upper
    node.edge, node.parent = node.edge[at:], upper
    upper.children[node.edge[0]] = node
    return upper


def _join(node: _Node) -> None:
    """One edge instead of two, where nothing branches and nothing ends."""
    if node.parent is None or node.entry is not None or len(node.children) != 1:
        return
    (child,) = node.children.values()
    child.edge, child.parent = node.edge + child.edge, node.parent
    node.parent.children[child.edge[0]] = child
