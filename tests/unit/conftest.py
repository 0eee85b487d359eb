"""Fixtures of unit tests: an empty output of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchjob.storage.store import Store, open_store
from tests.support.memory_store import MemoryStore
from tests.support.seaweed import Seaweed


@pytest.fixture
def memory() -> MemoryStore:
    """An empty output in memory."""
    return MemoryStore()


@pytest.fixture(params=["memory", "disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty output of each kind."""
    if request.param == "memory":
        return MemoryStore()
    if request.param == "disk":
        return open_store(str(tmp_path / "out"))
    s3: Seaweed = request.getfixturevalue("s3")
    return open_store(s3.bucket() + "out")
