"""Who can have the weights of a run."""

from pathlib import Path

import pytest

from dovetail.router.reach import out_of_reach
from dovetail.types.weights import Meeting, Snapshot

ELSEWHERE = "http://198.51.100.7:30001"


def _met(transport: str) -> Snapshot:
    return Snapshot(1, None, 0, Meeting(transport, "127.0.0.1", 1, "a", 1, "gloo", 1.0))


@pytest.mark.parametrize(
    ("snapshot", "refused"),
    [
        (Snapshot(1, Path("/dev/shm/dovetail-weights-a/1"), 0), True),
        (_met("cuda_ipc"), True),
        (_met("broadcast"), False),
        (Snapshot(1, Path("/data/weights/1"), 0), False),
        (None, False),
    ],
)
def test_an_engine_elsewhere_can_not_have_what_is_in_memory(
    snapshot: Snapshot | None, refused: bool
) -> None:
    why = out_of_reach(ELSEWHERE, snapshot)
    assert (why is not None) == refused
    assert why is None or ("--weight-transport broadcast" in why and "another machine" in why)
    for url in ("http://127.0.0.1:30001", "http://localhost:30001", "http://[::1]:30001"):
        assert out_of_reach(url, snapshot) is None
