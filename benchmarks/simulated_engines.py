"""A clock of events, and engines that decode many sequences at once.

All sequences of an engine advance together: a decode step takes `decode_base_s` and
`decode_sequence_s` more for each running one. So an engine counts tokens on a clock of its own, a
sequence that joins at count c is done at c + its length, and only the next one to be done is an
event.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


class Clock:
    """Calls what was asked for, in order of time, then of asking."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Call when it is `time`."""
        self._asked += 1
        heapq.heappush(self._events, (time, self._asked, call))

    def turn(self) -> bool:
        """The next event; False: there is none."""
        if not self._events:
            return False
        time, _, call = heapq.heappop(self._events)
        self.now = max(self.now, time)
        call()
        return True


@dataclass(frozen=True)
class EngineSpeed:
    """How fast one engine is."""

    decode_base_s: float
    """One decode step, however few sequences run."""
    decode_sequence_s: float
    """More of it for each running sequence."""
    prompt_s: float = 0.0
    """Reading one sequence's prompt; siblings after the first on an engine read none."""
    max_running: int = 256

    def step_s(self, running: int) -> float:
        """One token of each of `running` sequences."""
        return self.decode_base_s + self.decode_sequence_s * running

    @property
    def peak_tokens_per_s(self) -> float:
        """With every place taken."""
        return self.max_running / self.step_s(self.max_running)


@dataclass(eq=False, slots=True)
class Sequence:
    """One response under way."""

    group: int
    tokens: int
    """Left to make."""
    engine: int = -1
    joined: float = -1.0
    """The engine's token count when it began; -1: it waits."""
    gone: bool = False


@dataclass(eq=False)
class _Engine:
    clock: float = 0.0
    at: float = 0.0
    running: int = 0
    load: int = 0
    blocked_until: float = 0.0
    """Prompts are read until then."""
    paused_until: float = 0.0
    busy_s: float = 0.0
    made: float = 0.0
    stamp: int = 0
    last_group: int = -1
    heap: list[tuple[float, int, Sequence]] = field(default_factory=list)
    queue: deque[Sequence] = field(default_factory=deque)


class Engines:
    """`count` engines; a new sequence goes to the one with the fewest, as the router's does.

    Args:
        done: called with a sequence that has all its tokens.
    """

    def __init__(
        self, clock: Clock, count: int, speed: EngineSpeed, done: Callable[[Sequence], None]
    ) -> None:
        self.clock, self.speed, self._done = clock, speed, done
        self._engines = [_Engine() for _ in range(count)]
        self._by_load = [(0, number) for number in range(count)]
        self._serial = 0

    @property
    def busy_s(self) -> float:
        """Engine-seconds with at least one sequence, pauses apart."""
        self._advance_all()
        return sum(engine.busy_s for engine in self._engines)

    @property
    def made_tokens(self) -> float:
        """Of all engines, so far."""
        self._advance_all()
        return sum(engine.made for engine in self._engines)

    def submit(self, sequences: list[Sequence]) -> None:
        """Start these, or have them wait for a place."""
        touched = set()
        for sequence in sequences:
            number = self._least_loaded()
            self._advance(self._engines[number])
            sequence.engine = number
            self._engines[number].queue.append(sequence)
            touched.add(number)
            self._fill(self._engines[number])
        for number in sorted(touched):
            self._plan(number)

    def cancel(self, sequences: list[Sequence]) -> None:
        """End these where they stand; `tokens` is then what is left of each."""
        touched = set()
        for sequence in sequences:
            if sequence.gone or sequence.engine < 0:
                continue
            engine = self._engines[sequence.engine]
            self._advance(engine)
            sequence.gone = True
            self._unload(sequence.engine)
            if sequence.joined >= 0:
                engine.running -= 1
                sequence.tokens = max(1, sequence.tokens - int(engine.clock - sequence.joined))
            touched.add(sequence.engine)
        for number in sorted(touched):
            self._fill(self._engines[number])
            self._plan(number)

    def pause(self, seconds: float) -> None:
        """Nothing is decoded for a while."""
        if seconds <= 0:
            return
        now = self.clock.now
        for number, engine in enumerate(self._engines):
            self._advance(engine)
            engine.paused_until = max(engine.paused_until, now) + seconds
            if engine.blocked_until > now:
                engine.blocked_until += seconds
            self._plan(number)

    def _least_loaded(self) -> int:
        # Every change of a load leaves an entry; those that are no longer true are passed over.
        while True:
            load, number = heapq.heappop(self._by_load)
            if load == self._engines[number].load:
                break
        self._engines[number].load += 1
        heapq.heappush(self._by_load, (load + 1, number))
        return number

    def _unload(self, number: int) -> None:
        self._engines[number].load -= 1
        heapq.heappush(self._by_load, (self._engines[number].load, number))

    def _advance_all(self) -> None:
        for engine in self._engines:
            self._advance(engine)

    def _advance(self, engine: _Engine) -> None:
        now = self.clock.now
        if engine.running:
            engine.busy_s += max(0.0, now - max(engine.at, engine.paused_until))
            begin = max(engine.at, engine.paused_until, engine.blocked_until)
            if now > begin:
                tokens = (now - begin) / self.speed.step_s(engine.running)
                engine.clock += tokens
                engine.made += tokens * engine.running
        engine.at = now

    def _fill(self, engine: _Engine) -> None:
        """Sequences that wait take the free places."""
        while engine.queue and engine.running < self.speed.max_running:
            sequence = engine.queue.popleft()
            if sequence.gone:
                continue
            engine.running += 1
            sequence.joined = engine.clock
            self._serial += 1
            entry = (engine.clock + sequence.tokens, self._serial, sequence)
            heapq.heappush(engine.heap, entry)
            if self.speed.prompt_s and sequence.group != engine.last_group:
                ready = max(engine.blocked_until, engine.paused_until, self.clock.now)
                engine.blocked_until = ready + self.speed.prompt_s
                engine.last_group = sequence.group

    def _plan(self, number: int) -> None:
        """Ask for the engine's next event."""
        engine = self._engines[number]
        engine.stamp += 1
        while engine.heap and engine.heap[0][2].gone:
            heapq.heappop(engine.heap)
        if not engine.heap:
            return
        begin = max(self.clock.now, engine.paused_until, engine.blocked_until)
        left = max(0.0, engine.heap[0][0] - engine.clock)
        stamp = engine.stamp
        time = begin + left * self.speed.step_s(engine.running)
        self.clock.at(time, lambda: self._finish(number, stamp))

    def _finish(self, number: int, stamp: int) -> None:
        engine = self._engines[number]
        if engine.stamp != stamp:
            return
        self._advance(engine)
        finished = []
        # The first is done by definition; rounding may have left a trace of a token.
        limit = max(engine.clock, engine.heap[0][0])
        engine.clock = limit
        while engine.heap and engine.heap[0][0] <= limit + 1e-9:
            sequence = heapq.heappop(engine.heap)[2]
            if not sequence.gone:
                sequence.gone, sequence.tokens = True, 0
                engine.running -= 1
                self._unload(number)
                finished.append(sequence)
        self._fill(engine)
        self._plan(number)
        for sequence in finished:
            self._done(sequence)
