import sys
from collections.abc import Iterator

import pytest

from dovetail import compat


@pytest.fixture
def aliases_on() -> Iterator[None]:
    """The aliases, for one test; what was imported meanwhile is forgotten."""
    path, was_on = list(sys.path), compat.installed()
    compat.install()
    yield
    compat.uninstall()
    sys.path[:] = path
    if was_on:
        compat.install()
