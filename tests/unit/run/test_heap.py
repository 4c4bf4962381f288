"""What stands when the loop begins is left out of garbage collection while the loop turns."""

import gc
import weakref

import pytest

from dovetail.run.heap import settled_heap


class Node:
    """A part of a cycle: only the collector frees it."""

    def __init__(self):
        self.itself = self


def test_what_exists_is_frozen_inside_and_no_longer_after():
    with settled_heap():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_an_error_inside_unfreezes_too():
    with pytest.raises(ZeroDivisionError), settled_heap():
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0


def test_cycles_made_inside_are_collected_inside():
    with settled_heap():
        made = weakref.ref(Node())
        gc.collect()
        assert made() is None


def test_cycles_that_were_frozen_are_collected_after():
    node = Node()
    made = weakref.ref(node)
    with settled_heap():
        del node
        gc.collect()
        assert made() is not None
    gc.collect()
    assert made() is None
