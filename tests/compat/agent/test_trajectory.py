from __future__ import annotations

import threading

import pytest

from dovetail.compat.agent.trajectory import TrajectoryManager, TurnRecord
from dovetail.types import Sample

BASE = Sample(index=7, group_index=3, prompt="p", label="l", metadata={"from": "row"})


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _taken(manager: TrajectoryManager, reward: float = 1.0) -> list[Sample]:
    return manager.get_trajectory("s", base_sample=BASE, reward=reward)


def _turn(prompt: list[int], output: list[int], finish: str = "stop") -> TurnRecord:
    return TurnRecord(prompt, output, finish, [-0.5] * len(output))


def test_turns_that_continue_each_other_are_one_sample_of_exactly_what_was_sampled() -> None:
    manager = TrajectoryManager()
    manager.record_turn("s", turn=_turn([1, 2], [3, 4], "tool_calls"))
    manager.record_turn("s", turn=_turn([1, 2, 3, 4, 9], [5], "length"))
    (sample,) = _taken(manager, reward=0.25)
    assert sample.tokens == [1, 2, 3, 4, 9, 5] and sample.response_length == 4
    assert sample.loss_mask == [1, 1, 0, 1]
    assert sample.rollout_log_probs == [-0.5, -0.5, 0.0, -0.5]
    assert sample.status is Sample.Status.TRUNCATED and sample.reward == 0.25
    assert (sample.index, sample.group_index, sample.rollout_id) == (7, 3, 7)
    assert sample.metadata == {"from": "row", "truncated": True, "use_tool": False}
    assert BASE.metadata == {"from": "row"}
    assert _taken(manager) == []


def _drift(manager: TrajectoryManager, output: list[int]) -> list[Sample]:
    """The client sends the second token of the response back as another one."""
    asked = [_user("u")]
    manager.record_turn("s", turn=_turn([1, 2], [3, 4]), prompt_messages=asked)
    later = [*asked, _said("x"), _user("v")]
    manager.record_turn("s", turn=_turn([1, 2, 3, 8, 9], output), prompt_messages=later)
    return _taken(manager)


def test_a_response_that_came_back_differently_is_not_trained_where_a_short_turn_follows() -> None:
    (sample,) = _drift(TrajectoryManager(fork_threshold_tokens=2), [5])
    assert sample.tokens == [1, 2, 3, 8, 9, 5]
    assert sample.loss_mask == [0, 0, 0, 1]
    assert sample.rollout_log_probs == [0.0, 0.0, 0.0, -0.5]


@pytest.mark.parametrize("threshold", [2, 1, 0])
def test_it_is_trained_in_a_sample_of_its_own_where_a_long_turn_follows(threshold: int) -> None:
    first, second = _drift(TrajectoryManager(fork_threshold_tokens=threshold), [5, 6])
    assert (first.tokens, first.loss_mask) == ([1, 2, 3, 4], [1, 1])
    assert (second.tokens, second.loss_mask) == ([1, 2, 3, 8, 9, 5, 6], [1, 1])
    assert first.rollout_id == second.rollout_id == 7


def test_a_drift_before_the_last_response_begins_a_sample() -> None:
    manager = TrajectoryManager()
    asked = [_user("u")]
    manager.record_turn("s", turn=_turn([1, 2], [3]), prompt_messages=asked)
    later = [*asked, _said("x"), _user("v")]
    manager.record_turn("s", turn=_turn([1, 8, 3, 9], [5]), prompt_messages=later)
    assert [sample.loss_mask for sample in _taken(manager)] == [[1], [1]]


def test_a_retry_and_a_subagent_keep_their_own_samples() -> None:
    manager = TrajectoryManager()
    asked = [_user("u")]
    for output in ([3], [4]):
        manager.record_turn("s", turn=_turn([1, 2], output), prompt_messages=asked)
    manager.record_turn("s", turn=_turn([1, 7], [6]), prompt_messages=[_user("sub")])
    manager.record_turn(
        "s",
        turn=_turn([1, 2, 4, 9], [5]),
        prompt_messages=[*asked, _said("4"), _user("v")],
        response_message={**_said(""), "tool_calls": [{"id": "1"}]},
    )
    assert [(s.tokens, s.loss_mask) for s in _taken(manager)] == [
        ([1, 2, 3], [1]),
        ([1, 2, 4, 9, 5], [1, 0, 1]),
        ([1, 7, 6], [1]),
    ]


def test_every_sampled_token_is_trained_once_or_left_out_for_a_drift() -> None:
    manager = TrajectoryManager(fork_threshold_tokens=0)
    tokens, sampled = [1], []
    for step in range(6):
        output = [100 + step, 200 + step]
        sampled += output
        manager.record_turn("s", turn=_turn(list(tokens), output))
        tokens += output if step % 2 else [50 + step]
    trained = [
        token
        for sample in _taken(manager)
        for token, mask in zip(
            sample.tokens[-sample.response_length :], sample.loss_mask or [], strict=True
        )
        if mask
    ]
    assert sorted(trained) == sorted(sampled)


def test_a_session_without_output_gives_nothing_and_sessions_are_apart() -> None:
    manager = TrajectoryManager()
    manager.record_turn("s", turn=_turn([1, 2], []))
    manager.record_turn("other", turn=_turn([1, 2], [3]))
    assert _taken(manager) == []
    assert len(manager.get_trajectory("other", base_sample=BASE)) == 1
    with pytest.raises(ValueError, match="2 output ids but 1 logprobs"):
        manager.record_turn("s", turn=TurnRecord([1], [2, 3], "stop", [-0.5]))


def test_turns_may_come_from_many_threads() -> None:
    manager = TrajectoryManager()

    def record(number: int) -> None:
        for _ in range(50):
            manager.record_turn(f"s{number % 4}", turn=_turn([number], [number]))

    threads = [threading.Thread(target=record, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = [len(manager.get_trajectory(f"s{n}", base_sample=BASE)) for n in range(4)]
    assert counts == [100] * 4
