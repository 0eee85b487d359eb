"""The simulation's short form: two drivers, three workers and a discard in any order, with any fault of the store."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_store import MemoryStore
from simulation import play

from batchjob.errors import Temporary
from batchjob.output import commit, success
from batchjob.output.provenance import PartFooter
from batchjob.types import ShardKey


def test_nothing_is_lost_doubled_or_foreign_in_any_order(seed: int) -> None:
    tally = play(200, seed)
    assert tally["commits"] > tally["schedules"]
    assert min(tally["Temporary"], tally["killed"]) > 0, "nobody was in anybody's way"


def test_a_part_whose_plan_was_discarded_during_its_put_is_taken_back(tmp_path: Path) -> None:
    store, buried, key = MemoryStore(), list[str](), ShardKey(0, "s" * 16, 1, 0, 0)
    store.inject("put_if_absent", "predictions/*", lambda: buried.append("p"))
    made = PartFooter("p", key.id, 0, "a", 0, "f", "m", 1, 0, {}, {}, {})
    (tmp_path / "part").write_bytes(b"rows")

    def wanted() -> None:
        if buried:
            raise Temporary("the plan was discarded")

    with pytest.raises(Temporary, match="discarded"):
        commit.commit_part(store, key, tmp_path / "part", made, wanted)
    assert store.stored_keys() == []


def test_a_success_whose_plan_was_discarded_during_its_put_is_taken_back() -> None:
    store, buried = MemoryStore(), list[str]()
    store.inject("put_if_absent", "_SUCCESS", lambda: buried.append("p"))

    def wanted() -> None:
        if buried:
            raise Temporary("the plan was discarded")

    with pytest.raises(Temporary, match="discarded"):
        success.write_success(store, {"plan": "p", "counts": {}}, [], wanted)
    assert store.stored_keys() == []
