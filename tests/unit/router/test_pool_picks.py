"""Which engine gets a request, by policy; and when one is left alone."""

from __future__ import annotations

from collections import Counter

import pytest

from dovetail.router.balancer.breaker import FIRST_REST_S, LONGEST_REST_S, Breaker, BreakerState
from dovetail.router.balancer.pick import (
    POLICIES,
    CacheAware,
    ConsistentHashing,
    LeastLoaded,
    Manual,
    RoundRobin,
    make_policy,
    prefix_hashes,
    session_key,
)
from dovetail.router.balancer.worker import Call, Worker, WorkerState
from dovetail.types import ConfigError
from tests.unit.router.fakes import HeldEngine


def workers(count: int) -> list[Worker]:
    made = [Worker.of(HeldEngine(f"http://{name}:1"), 3) for name in "abcdefgh"[:count]]
    for worker in made:
        worker.state = WorkerState.READY
    return made


def test_round_robin_takes_turns_also_when_engines_come_and_go() -> None:
    policy, (a, b, c) = RoundRobin(), workers(3)
    assert [policy.pick(Call(), [a, b, c]) for _ in range(6)] == [a, b, c, a, b, c]
    assert [policy.pick(Call(), [a, c]) for _ in range(2)] == [a, c]
    assert policy.pick(Call(), [a, b, c]) is b


def test_least_loaded_takes_the_least_busy_one_and_turns_among_equals() -> None:
    policy, (a, b, c) = LeastLoaded(), workers(3)
    a.in_flight = 2
    assert [policy.pick(Call(), [a, b, c]) for _ in range(4)] == [b, c, b, c]
    b.in_flight = c.in_flight = 5
    assert policy.pick(Call(), [a, b, c]) is a


def test_siblings_of_one_prompt_go_where_its_beginning_is_cached() -> None:
    policy, three = CacheAware(), workers(3)
    prompts = [tuple(range(100 * i, 100 * i + 64)) for i in range(30)]
    homes = {}
    for prompt in prompts:
        homes[prompt] = policy.pick(Call(prompt), three)
        homes[prompt].in_flight += 1
    assert Counter(worker.url for worker in homes.values()) == dict.fromkeys(
        ["http://a:1", "http://b:1", "http://c:1"], 10
    )
    for prompt in prompts:
        # A sibling, and the next turn of a conversation.
        assert policy.pick(Call(prompt), three) is homes[prompt]
        assert policy.pick(Call((*prompt, *range(20))), three) is homes[prompt]


def test_a_short_beginning_in_common_does_not_count() -> None:
    policy, (a, b) = CacheAware(), workers(2)
    system = tuple(range(16))
    first = policy.pick(Call((*system, *range(1000, 1100))), [a, b])
    first.in_flight += 1
    assert policy.pick(Call((*system, *range(2000, 2100))), [a, b]) is not first


def test_a_cache_is_no_reason_to_queue_up() -> None:
    policy, (a, b) = CacheAware(), workers(2)
    prompt = tuple(range(64))
    home = policy.pick(Call(prompt), [a, b])
    other = b if home is a else a
    home.in_flight = 16
    assert policy.pick(Call(prompt), [a, b]) is home
    home.in_flight = 17
    assert policy.pick(Call(prompt), [a, b]) is other
    other.in_flight = 2
    assert policy.pick(Call(prompt), [a, b]) is other


def test_a_restarted_engine_has_nothing_cached() -> None:
    policy, (a, b) = CacheAware(), workers(2)
    prompt = tuple(range(64))
    home = policy.pick(Call(prompt), [a, b])
    home.in_flight = 1
    policy.forget([home])
    assert policy.pick(Call(prompt), [a, b]) is not home


def test_what_cache_aware_remembers_is_bounded() -> None:
    policy, two = CacheAware(most_prefixes=1000), workers(2)
    for i in range(500):
        policy.pick(Call(tuple(range(i, i + 200))), two)
    assert len(policy._seen) <= 1000
    policy.forget(two)
    assert not policy._seen and not policy._bits


def test_hashes_of_prefixes_agree_as_far_as_prompts_do() -> None:
    one = prefix_hashes(tuple(range(100)))
    other = prefix_hashes((*range(50), *range(1000, 1050)))
    same = [a == b for a, b in zip(one, other, strict=True)]
    # 16, 19, 23, 27, 32, 38, 45 | 54, 64, 76, 91
    assert same == [True] * 7 + [False] * 4
    assert prefix_hashes(b"x" * 15) == []
    assert prefix_hashes(b"x" * 40) == prefix_hashes(b"x" * 44)


def test_sessions_stay_with_their_engine_and_only_a_lost_ones_move() -> None:
    policy, four = ConsistentHashing(), workers(4)
    keys = [f"session {i}" for i in range(400)]
    before = {key: policy.pick(Call(key=key), four) for key in keys}
    assert before == {key: policy.pick(Call(key=key), four) for key in keys}
    shares = Counter(worker.url for worker in before.values())
    assert min(shares.values()) > 50
    left = four[1:]
    after = {key: policy.pick(Call(key=key), left) for key in keys}
    assert all(after[key] is before[key] for key in keys if before[key] is not four[0])
    assert {policy.pick(Call(key=key), four) for key in keys} == set(four)


def test_without_a_session_the_least_busy_engine_is_taken() -> None:
    a, b = workers(2)
    a.in_flight = 1
    assert ConsistentHashing().pick(Call(), [a, b]) is b
    assert Manual().pick(Call(), [a, b]) is b


def test_manual_keeps_a_session_through_a_busy_moment_and_moves_it_from_a_dead_engine() -> None:
    policy, (a, b) = Manual(), workers(2)
    home = policy.pick(Call(key="s"), [a, b])
    other = b if home is a else a
    home.in_flight = 100
    assert policy.pick(Call(key="s"), [a, b]) is home
    # Full for a moment: it is not among those with room.
    assert policy.pick(Call(key="s"), [other]) is other
    assert policy.pick(Call(key="s"), [a, b]) is home
    home.state = WorkerState.DEAD
    assert policy.pick(Call(key="s"), [other]) is other
    home.state = WorkerState.READY
    assert policy.pick(Call(key="s"), [a, b]) is other


def test_manual_remembers_so_many_sessions() -> None:
    policy, two = Manual(most_sessions=10), workers(2)
    for i in range(100):
        policy.pick(Call(key=f"{i}"), two)
    assert list(policy._homes) == [f"{i}" for i in range(90, 100)]


def test_the_session_is_in_either_header() -> None:
    assert session_key([(b"x-session-id", b"s"), (b"host", b"h")]) == "s"
    assert session_key([(b"x-session-id", b"s"), (b"x-smg-routing-key", b"k")]) == "k"
    assert session_key([(b"host", b"h")]) is None
    assert session_key([(b"x-session-id", b"")]) is None


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match="router_policy: got 'fastest', expected one of"):
        make_policy("fastest")
    assert all(make_policy(name) for name in POLICIES)


def test_a_breaker_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(3)
    for _ in range(5):
        breaker.failure(0.0)
        breaker.failure(0.0)
        breaker.success()
    assert breaker.state is BreakerState.CLOSED
    assert [breaker.failure(0.0) for _ in range(3)] == [False, False, True]
    assert not breaker.allows(0.5)
    assert breaker.allows(FIRST_REST_S)


def test_a_resting_engine_is_tried_less_and_less_often() -> None:
    breaker, now, rests = Breaker(1), 0.0, []
    for _ in range(8):
        breaker.failure(now)
        rests.append(breaker.next_at - now)
        now = breaker.next_at
        assert breaker.allows(now)
        breaker.begin(now)
        assert not breaker.allows(now)
    assert rests == [1, 2, 4, 8, 16, LONGEST_REST_S, LONGEST_REST_S, LONGEST_REST_S]
    breaker.success()
    assert breaker.state is BreakerState.CLOSED and breaker.allows(0.0)


def test_failures_that_come_in_late_do_not_prolong_a_rest() -> None:
    breaker = Breaker(1)
    breaker.failure(0.0)
    for late in range(50):
        breaker.failure(late / 100)
    assert breaker.next_at == FIRST_REST_S
