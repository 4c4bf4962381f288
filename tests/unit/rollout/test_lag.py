"""The window of groups that may be trained, against a model of what it promises."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dovetail.rollout.lag import LagWindow


def started(window, *groups):
    for group in groups:
        window.issue(group)


def test_groups_of_a_step_are_issued_when_the_version_that_its_lag_allows_is_published():
    window = LagWindow(target=3, max_lag=1)
    assert (window.wanted(), window.may_begin(0)) == (0, False)
    window.publish(0)
    assert (window.wanted(), window.may_begin(1), window.may_begin(2)) == (6, True, False)
    started(window, *range(6))
    assert window.wanted() == 0
    window.publish(1)
    assert (window.wanted(), window.may_begin(2)) == (3, True)


def test_nothing_is_issued_for_steps_after_the_last():
    window = LagWindow(target=3, max_lag=4, num_steps=2)
    window.publish(0)
    assert window.wanted() == 6


def test_steps_that_wait_and_groups_under_way_can_be_held_down():
    window = LagWindow(target=2, max_lag=4, max_open=2, max_in_flight=3)
    window.publish(0)
    assert window.wanted() == 3
    started(window, 0, 1, 2)
    for group in range(2):
        window.finish(group)
        window.keep(window.next())
    window.close_step()
    # Step 0 is in training, steps 1 and 2 are open.
    assert (window.last_open, window.wanted()) == (2, 2)


def test_a_step_waits_for_what_no_later_step_could_take():
    window = LagWindow(target=2, max_lag=1)
    window.publish(0)
    started(window, 0, 1, 2, 3)
    for group in (2, 3):
        window.finish(group)
        window.keep(window.next())
    window.close_step()
    window.publish(1)
    started(window, 4, 5)
    window.finish(4)
    assert window.next() is None, "both places of step 1 are for groups 0 and 1"
    window.finish(1)
    window.finish(0)
    assert window.next() == 0
    window.keep(0)
    assert window.next() == 1
    window.keep(1)
    assert window.full and window.overdue() == []


def test_the_oldest_tokens_go_first():
    window = LagWindow(target=2, max_lag=2)
    window.publish(3)
    window.step = 3
    started(window, 0)
    window.issue(1, oldest=1)
    started(window, 2)
    window.finish(0)
    assert window.next() == 0, "there is room for group 1 beside it"
    window.finish(1)
    assert window.next() == 1


def test_what_is_too_old_is_named_until_it_is_let_go():
    window = LagWindow(target=1, max_lag=1)
    window.publish(0)
    started(window, 0, 1, 2)
    for group in (0, 1):
        window.finish(group)
        window.keep(window.next())
        window.close_step()
    window.publish(2)
    assert window.overdue() == [2]
    window.finish(2)
    assert (window.overdue(), window.next()) == ([2], None)
    window.take_back(2)
    assert (window.overdue(), window.put_back, window.pending) == ([], 1, 2)


def test_a_window_that_keeps_what_is_old_takes_groups_as_they_finish():
    window = LagWindow(target=1, max_lag=1, keeps_stale=True)
    window.publish(0)
    started(window, 0, 1)
    window.finish(1)
    window.keep(window.next())
    window.close_step()
    window.step = 5
    window.publish(5)
    window.finish(0)
    assert window.overdue() == [] and window.next() == 0


class Windows(RuleBasedStateMachine):
    """Groups are issued, made, refused, lost, trained and published in any order."""

    @initialize(
        size=st.integers(1, 4),
        max_lag=st.integers(0, 4),
        submit_size=st.integers(1, 6),
        max_open=st.none() | st.integers(1, 4),
        max_in_flight=st.none() | st.integers(1, 9),
        keeps_stale=st.booleans(),
        interval=st.integers(1, 3),
    )
    def start(self, interval, size, **settings):
        self.window = LagWindow(target=size, **settings)
        self.interval = min(interval, self.window.max_lag + 1)
        self.done = self.numbers = 0
        self.oldest = {}  # Of the tokens of each group; what the machine may only be told.
        self.in_flight, self.waiting, self.filled = [], [], {}
        self.left, self.lags = Counter(), []
        self.window.publish(0)

    @rule(resumed=st.integers(0, 5))
    def issue(self, resumed):
        window = self.window
        for _ in range(window.wanted()):
            old = max(window.version - resumed, 0) if resumed else None
            if old is not None and window.is_stale(old):
                old = None
            window.issue(self.numbers, old)
            self.oldest[self.numbers] = window.version if old is None else old
            self.in_flight.append(self.numbers)
            self.numbers += 1
        if window.max_in_flight is None:
            assert window.wanted() == 0
        else:
            assert window.in_flight <= window.max_in_flight

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), knows=st.booleans())
    def finish(self, data, knows):
        group = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(group)
        self.waiting.append(group)
        self.window.finish(group, self.oldest[group] if knows else None)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def go_on(self, data):
        group = data.draw(st.sampled_from(self.in_flight))
        self.window.again(group, self.oldest[group])

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def fail(self, data):
        group = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(group)
        self.window.drop(group, "failed")
        self.left["dropped"] += 1

    @rule(refused=st.sets(st.integers(0, 3)))
    def fill(self, refused):
        window, looked = self.window, 0
        while (group := window.next()) is not None:
            self.waiting.remove(group)
            if looked in refused:
                window.drop(group, "refused")
                self.left["dropped"] += 1
            else:
                window.keep(group)
                lag = window.step - self.oldest[group]
                assert window.keeps_stale or lag <= window.max_lag
                self.lags.append(lag)
                self.filled.setdefault(window.step, []).append(group)
            looked += 1

    @precondition(lambda self: self.window.full)
    @rule(back=st.booleans())
    def close(self, back):
        step = self.window.step
        assert self.window.close_step() == self.filled[step]
        for group in self.window.overdue():
            (self.in_flight if group in self.in_flight else self.waiting).remove(group)
            if back:
                self.window.take_back(group)
            else:
                self.window.drop(group, "stale")
            self.left["put_back" if back else "dropped"] += 1

    @precondition(lambda self: self.done < self.window.step)
    @rule()
    def train(self):
        assert self.window.trained(self.done) == self.filled[self.done]
        self.left["trained"] += len(self.filled.pop(self.done))
        self.done += 1
        if self.done % self.interval == 0:
            self.window.publish(self.done)

    @invariant()
    def every_group_is_in_one_place(self):
        window = self.window
        assert window.issued == self.numbers
        assert window.pending == self.numbers - self.left.total()
        assert window.num_trained == self.left["trained"]
        assert window.dropped.total() == self.left["dropped"]
        assert window.put_back == self.left["put_back"]
        held = len(self.in_flight) + len(self.waiting) + sum(map(len, self.filled.values()))
        assert window.pending == held

    @invariant()
    def nothing_is_made_ahead_of_what_the_lag_allows(self):
        window = self.window
        assert window.last_open <= window.version + window.max_lag
        if window.step > self.done and window.full:
            assert window.step <= window.version + window.max_lag

    @invariant()
    def there_is_always_something_to_do(self):
        """No state in which everyone waits for everyone."""
        window = self.window
        idle = not (self.in_flight or window.full or self.done < window.step)
        if idle and not window.overdue() and window.next() is None:
            assert window.wanted() > 0


TestWindows = Windows.TestCase
TestWindows.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
