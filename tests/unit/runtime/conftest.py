"""Fixtures of tests with a fleet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.runtime.places import Place, end


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    end(made)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, token_s=0.02)
    yield made
    end(made)
