"""Short simulation: two drivers, three workers and a discard in any order, with any fault of the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchjob.errors import Temporary
from batchjob.output import commit, success
from batchjob.types import ShardKey
from tests.simulation import play
from tests.support.memory_store import MemoryStore
from tests.support.part_footers import make_footer


def test_invariants_hold_in_every_order_of_calls(seed: int) -> None:
    tally = play(200, seed)
    assert tally["commits"] > tally["schedules"]
    assert min(tally["Temporary"], tally["killed"]) > 0, "the processes never disturbed each other"


def test_part_whose_plan_was_discarded_during_its_put_is_deleted_again(tmp_path: Path) -> None:
    store, discarded_plans, key = MemoryStore(), list[str](), ShardKey(0, "s" * 16, 1, 0, 0)
    store.inject("put_if_absent", "predictions/*", lambda: discarded_plans.append("p"))
    footer = make_footer(key, plan="p")
    (tmp_path / "part").write_bytes(b"rows")

    def raise_if_discarded() -> None:
        if discarded_plans:
            raise Temporary("the plan was discarded")

    with pytest.raises(Temporary, match="discarded"):
        commit.commit_part(store, key, tmp_path / "part", footer, raise_if_discarded)
    assert store.stored_keys() == []


def test_success_whose_plan_was_discarded_during_its_put_is_deleted_again() -> None:
    store, discarded_plans = MemoryStore(), list[str]()
    store.inject("put_if_absent", "_SUCCESS", lambda: discarded_plans.append("p"))

    def raise_if_discarded() -> None:
        if discarded_plans:
            raise Temporary("the plan was discarded")

    with pytest.raises(Temporary, match="discarded"):
        success.write_success(store, {"plan": "p", "counts": {}}, [], raise_if_discarded)
    assert store.stored_keys() == []
