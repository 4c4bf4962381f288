"""The admission counter against a model of what it promises."""

import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.rollout.admit import Admission
from dovetail.types import DynamicFilterOutput, RolloutError

KEEP = DynamicFilterOutput(keep=True)
DROP = DynamicFilterOutput(keep=False, reason="equal")
RESCUE = DynamicFilterOutput(keep=False, reason="equal", keep_when_insufficient=True)


def conserved(admission):
    gone = admission.kept + admission.put_back + admission.discarded
    gone += admission.dropped.total() + admission.failed.total()
    return admission.issued == gone + admission.in_flight


def test_a_plain_step_issues_the_target_once_and_is_then_full():
    admission = Admission(target=3, submit_size=3)
    assert admission.wanted() == 3
    admission.issue(3)
    assert admission.wanted() == 0
    assert [admission.judge(KEEP) for _ in range(3)] == [True] * 3
    assert admission.enough and admission.wanted() == 0 and admission.in_flight == 0


def test_over_sampling_issues_whole_submissions():
    admission = Admission(target=3, submit_size=8)
    assert admission.wanted() == 8
    admission.issue(8)
    for _ in range(5):
        admission.judge(DROP)
    assert (admission.in_flight, admission.wanted()) == (3, 0)
    admission.judge(DROP)
    assert admission.wanted() == 8


def test_small_submissions_are_repeated_until_the_target_can_be_reached():
    admission = Admission(target=5, submit_size=2)
    assert admission.wanted() == 6


def test_a_refused_group_is_rescued_only_when_dropping_it_would_cost_another_round():
    admission = Admission(target=2, submit_size=3)
    admission.issue(3)
    assert not admission.judge(RESCUE)
    assert admission.judge(RESCUE)
    assert admission.judge(RESCUE)
    assert admission.enough and admission.dropped["equal"] == 1


def test_drops_in_a_row_end_the_run_and_name_filter_and_flag():
    admission = Admission(target=2, submit_size=2, max_dropped=3)
    admission.issue(9)
    admission.judge(DROP)
    admission.judge(DROP)
    admission.judge(KEEP)
    admission.judge(DROP)
    admission.judge(DROP)
    with pytest.raises(RolloutError, match=r"3 groups in a row.*equal: 5.*1 of 2") as caught:
        admission.judge(DROP)
    assert "--dynamic-sampling-filter-path" in str(caught.value)
    assert "--max-dropped-groups" in str(caught.value)


def test_failures_in_a_row_end_the_run_and_name_the_last_error():
    admission = Admission(target=2, submit_size=2, max_failed=2)
    admission.issue(4)
    admission.fail(ValueError("first"))
    admission.judge(DROP)
    admission.fail(ValueError("second"))
    with pytest.raises(RolloutError, match="KeyError: 'third'") as caught:
        admission.fail(KeyError("third"))
    assert isinstance(caught.value.__cause__, KeyError)
    assert "--custom-generate-function-path" in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(
    target=st.integers(1, 6),
    submit_size=st.integers(1, 9),
    partial=st.booleans(),
    events=st.lists(
        st.tuples(st.integers(0, 20), st.sampled_from([KEEP, DROP, RESCUE, "fail"])), min_size=40
    ),
)
def test_every_issued_group_leaves_exactly_once(target, submit_size, partial, events):
    """A fake clock delivers groups in the order of their durations."""
    admission = Admission(target, submit_size, max_dropped=30, max_failed=30)
    clock, in_air, script, issued = 0, [], iter(events), 0
    kept, left, settled = [], [], []
    try:
        while not admission.enough:
            for _ in range(wanted := admission.wanted()):
                duration, end = next(script, (1, KEEP))
                heapq.heappush(in_air, (clock + duration, issued, end))
                issued += 1
            admission.issue(wanted)
            assert conserved(admission) and admission.in_flight == len(in_air)
            assert admission.kept + admission.in_flight >= target
            clock, number, end = heapq.heappop(in_air)
            if end == "fail":
                admission.fail(ValueError())
                left.append(number)
            else:
                (kept if admission.judge(end) else left).append(number)
    except RolloutError:
        assert 30 in (admission.dropped_in_a_row, admission.failed_in_a_row)
    for _, number, _ in in_air:
        (admission.take_back if partial else admission.discard)()
        settled.append(number)
    assert conserved(admission) and len(kept) == admission.kept <= target
    if admission.in_flight == 0:
        assert sorted(kept + left + settled) == list(range(issued))
        assert admission.put_back + admission.discarded == len(settled)
