"""Which of several engines gets a request: one class per policy, one row per name."""

from __future__ import annotations

import bisect
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from dovetail.router.balancer.worker import Call, Worker
from dovetail.types.errors import ConfigError

MOST_SESSIONS = 262_144
"""Sessions that `manual` remembers; the one not heard of for longest is forgotten first."""
MOST_PREFIXES = 131_072
"""Prefixes that `cache_aware` remembers."""
LEAST_SHARE = 0.5
"""A prompt follows its prefix when the engine has at least this part of it."""
SLACK, SLACK_RATIO = 16, 1.5
"""... and no more requests than this beyond the least busy one's."""
_POINTS = 96
"""Places on the ring for each engine: the shares of two engines differ by about a tenth."""
_SESSION_HEADERS = (b"x-smg-routing-key", b"x-session-id")


class Policy(Protocol):
    """Chooses among engines that have room."""

    def pick(self, call: Call, workers: Sequence[Worker]) -> Worker:
        """One of `workers`, of which there is at least one."""
        ...

    def forget(self, workers: Sequence[Worker]) -> None:
        """Their caches are empty now, or they are gone."""
        ...


def session_key(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The session that a request's headers name: `X-SMG-Routing-Key`, else `x-session-id`.

    Args:
        headers: names in lower case and values, as ASGI has them.
    """
    found = {name: value for name, value in headers if name in _SESSION_HEADERS}
    value = next((found[name] for name in _SESSION_HEADERS if found.get(name)), None)
    return None if value is None else value.decode("latin-1")


class RoundRobin:
    """In turn."""

    def __init__(self) -> None:
        self._last: Worker | None = None
        self._turns: dict[Worker, int] = {}
        self._turn = 0

    def pick(self, call: Call, workers: Sequence[Worker]) -> Worker:
        """The one whose turn is longest ago."""
        turns = self._turns
        picked = min(workers, key=lambda worker: turns.get(worker, -1))
        self._turn += 1
        turns[picked] = self._turn
        return picked

    def forget(self, workers: Sequence[Worker]) -> None:
        """They start without a turn."""
        for worker in workers:
            self._turns.pop(worker, None)


class LeastLoaded:
    """The one with the fewest requests; of several such ones, in turn."""

    def __init__(self) -> None:
        self._turns = RoundRobin()

    def pick(self, call: Call, workers: Sequence[Worker]) -> Worker:
        """The least busy one."""
        if len(workers) == 1:
            return workers[0]
        least = min(worker.in_flight for worker in workers)
        return self._turns.pick(call, [one for one in workers if one.in_flight == least])

    def forget(self, workers: Sequence[Worker]) -> None:
        """They start without a turn."""
        self._turns.forget(workers)


class CacheAware:
    """The one that saw the longest beginning of this prompt, unless it is much busier than others.

    What an engine saw is kept as hashes of prefixes whose lengths grow by about a fifth from one to
    the next: a prompt of n tokens costs O(n) to look up and O(log n) memory, and the shared length
    is known within a fifth.
    """

    def __init__(self, most_prefixes: int = MOST_PREFIXES) -> None:
        self._most = most_prefixes
        self._seen: OrderedDict[int, int] = OrderedDict()
        """Hash of a prefix -> engines that saw it, one bit each."""
        self._bits: dict[Worker, int] = {}
        self._otherwise = LeastLoaded()

    def pick(self, call: Call, workers: Sequence[Worker]) -> Worker:
        """The one with the longest shared prefix, or the least busy one."""
        if len(workers) == 1 and len(self._bits) <= 1:
            return workers[0]
        hashes = prefix_hashes(call.prompt)
        worker = self._follow(hashes, workers) or self._otherwise.pick(call, workers)
        self._remember(hashes, worker)
        return worker

    def forget(self, workers: Sequence[Worker]) -> None:
        """They have none of what they saw."""
        self._otherwise.forget(workers)
        gone = 0
        for worker in workers:
            gone |= self._bits.pop(worker, 0)
        if not self._bits:
            self._seen.clear()
        elif gone:
            left = ((prefix, bits & ~gone) for prefix, bits in self._seen.items())
            self._seen = OrderedDict((prefix, bits) for prefix, bits in left if bits)

    def _follow(self, hashes: list[int], workers: Sequence[Worker]) -> Worker | None:
        bits, seen = self._bits, self._seen
        here = 0
        for worker in workers:
            here |= bits.get(worker, 0)
        # The lengths grow by 2 ** (1 / 4): half of the prompt is four places from its end.
        for prefix in reversed(hashes[_shortest(len(hashes)) :]):
            having = seen.get(prefix, 0) & here
            if having:
                found = [one for one in workers if bits.get(one, 0) & having]
                best = min(found, key=lambda worker: worker.in_flight)
                least = min(worker.in_flight for worker in workers)
                return best if best.in_flight <= SLACK + SLACK_RATIO * least else None
        return None

    def _remember(self, hashes: list[int], worker: Worker) -> None:
        bit = self._bits.get(worker)
        if bit is None:
            taken = set(self._bits.values())
            bit = next(1 << i for i in range(len(taken) + 1) if 1 << i not in taken)
            self._bits[worker] = bit
        seen = self._seen
        for prefix in hashes:
            seen[prefix] = seen.get(prefix, 0) | bit
            seen.move_to_end(prefix)
        while len(seen) > self._most:
            seen.popitem(last=False)


_LENGTHS = [round(16 * 2 ** (i / 4)) for i in range(72)]


def _shortest(count: int) -> int:
    """The first of `count` prefixes that has the least share of the prompt."""
    return max(0, count - 1 - 4 * round(1 / LEAST_SHARE - 1))


def prefix_hashes(prompt: Sequence[int] | bytes) -> list[int]:
    """A hash of each of its prefixes of the lengths 16, 19, 23, 27, 32, ..."""
    hashes, before, value = [], 0, 0
    most = len(prompt)
    for length in _LENGTHS:
        if length > most:
            break
        value = hash((value, prompt[before:length]))
        hashes.append(value)
        before = length
    return hashes


class ConsistentHashing:
    """Each session has a place on a ring and goes to the next engine from there; an engine that
    comes or goes moves only its own share of the sessions. One without room is passed over
    (consistent hashing with bounded loads, arXiv 1608.01350). Without a session: the least busy.
    """

    def __init__(self) -> None:
        self._rings: OrderedDict[tuple[str, ...], tuple[list[int], list[str]]] = OrderedDict()
        self._otherwise = LeastLoaded()

    def pick(self, call: Call, workers: Sequence[Worker]) -> Worker:
        """The next one on the ring."""
        if call.key is None:
            return self._otherwise.pick(call, workers)
        by_url = {worker.url: worker for worker in workers}
        places, urls = self._ring(tuple(sorted(by_url)))
        at = bisect.bisect(places, _place(call.key)) % len(places)
        return by_url[urls[at]]

    def forget(self, workers: Sequence[Worker]) -> None:
        """A place on the ring is an address: it stays for when the engine is back."""
        self._otherwise.forget(workers)

    def _ring(self, urls: tuple[str, ...]) -> tuple[list[int], list[str]]:
        """The ring of these engines: the others' places are as good as absent."""
        ring = self._rings.get(urls)
        if ring is None:
            points = sorted((_place(f"{url}#{i}"), url) for url in urls for i in range(_POINTS))
            ring = [place for place, _ in points], [url for _, url in points]
            self._rings[urls] = ring
            if len(self._rings) > 64:
                self._rings.popitem(last=False)
        return ring


def _place(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Manual:
    """Each session stays with the engine that it got first, the least busy one then. While that
    one has no room another one helps out; when it is gone, the session moves."""

    def __init__(self, most_sessions: int = MOST_SESSIONS) -> None:
        self._most = most_sessions
        self._homes: OrderedDict[str, Worker] = OrderedDict()
        self._otherwise = LeastLoaded()

    def pick(self, call: Call, workers: Sequence[Worker]) -> Worker:
        """The session's own."""
        if call.key is None:
            return self._otherwise.pick(call, workers)
        home = self._homes.get(call.key)
        if home is not None and home.ready:
            self._homes.move_to_end(call.key)
            return home if home in workers else self._otherwise.pick(call, workers)
        home = self._homes[call.key] = self._otherwise.pick(call, workers)
        self._homes.move_to_end(call.key)
        if len(self._homes) > self._most:
            self._homes.popitem(last=False)
        return home

    def forget(self, workers: Sequence[Worker]) -> None:
        """A session keeps its engine; that of one that is dead moves when it is heard of again."""
        self._otherwise.forget(workers)


POLICIES: dict[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "cache_aware": CacheAware,
    "consistent_hashing": ConsistentHashing,
    "manual": Manual,
}


def make_policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in POLICIES:
        raise ConfigError(
            f"router_policy: got {name!r}, expected one of {', '.join(POLICIES)} "
            "(--router-policy, TOML: router.router_policy)"
        )
    return POLICIES[name]()
