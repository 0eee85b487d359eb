"""`_SUCCESS` and `report.json`: written, read, replaced and deleted under conditions; totals over parts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from batchjob.errors import CheckFailed, Temporary, Unavailable
from batchjob.output.listed_parts import find_part_mismatches
from batchjob.output.success import (
    SUCCESS,
    Part,
    Totals,
    delete_orphaned_success,
    read_success,
    write_report,
    write_success,
)
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.store import Store
from batchjob.types import ShardKey
from tests.support.memory_store import Fault, MemoryStore
from tests.support.part_footers import make_footer

FOOTER = make_footer(
    ShardKey(17, "5eed5eed5eed5eed", 4, 0, 0), failed=1, errors={"decode/truncated": 1}, seconds={"wall": 1.5}
)
PARTS = [Part("predictions/a", 4, 1, "etag-a", 100), Part("predictions/b", 3, 0, None, 90)]
LISTING = {
    "predictions/a": ObjectInfo("predictions/a", 100, "etag-a", "1"),
    "predictions/b": ObjectInfo("predictions/b", 90),
}


def test_success_is_written_and_read_back(store: Store) -> None:
    assert read_success(store) is None
    write_success(store, {"plan": "p", "counts": {"planned": 7}}, PARTS)
    found = read_success(store)
    assert found is not None
    content, info = found
    assert content["plan"] == "p"
    part = {"name": "predictions/a", "rows": 4, "failed": 1, "etag": "etag-a", "size": 100, "attempt": None}
    assert content["parts"][0] == part
    assert (info.uri, info.version) == (SUCCESS, store.stat(SUCCESS).version)
    assert find_part_mismatches(store, content, LISTING) == []


def test_same_success_is_not_written_again(memory: MemoryStore) -> None:
    write_success(memory, {"plan": "p"}, PARTS)
    before = memory.read(SUCCESS)
    write_success(memory, {"plan": "p"}, PARTS)
    assert memory.read(SUCCESS) == before


def test_different_success_is_replaced(store: Store) -> None:
    write_success(store, {"plan": "old"}, PARTS[:1])
    write_success(store, {"plan": "new"}, PARTS)
    found = read_success(store)
    assert found is not None
    assert (found[0]["plan"], len(found[0]["parts"])) == ("new", 2)


def test_success_is_replaced_on_condition_of_its_version(memory: MemoryStore) -> None:
    write_success(memory, {"plan": "old"}, PARTS)
    rival = memory.client()
    memory.inject("replace_if_match", SUCCESS, lambda: write_success(rival, {"plan": "theirs"}, PARTS))
    write_success(memory, {"plan": "new"}, PARTS)
    assert memory.written_keys().count(SUCCESS) > 3  # the first replacement lost the race and was repeated
    assert json.loads(memory.read(SUCCESS).data)["plan"] == "new"


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("fault", [Fault.REPEATED, Fault.CONFLICT])
def test_success_is_written_despite_wrong_answers(memory: MemoryStore, exists: bool, fault: Fault) -> None:
    if exists:
        write_success(memory, {"plan": "old"}, PARTS)
    memory.inject("replace_if_match" if exists else "put_if_absent", SUCCESS, fault)
    write_success(memory, {"plan": "new"}, PARTS)
    assert json.loads(memory.read(SUCCESS).data)["plan"] == "new"


def test_success_that_cannot_be_written_is_an_error(memory: MemoryStore) -> None:
    memory.inject("put_if_absent", SUCCESS, Fault.CONFLICT, times=100)
    with pytest.raises(Temporary, match="_SUCCESS could not be written"):
        write_success(memory, {"plan": "p"}, PARTS)
    memory.inject("put_if_absent", "_batchjob/report.json", Fault.DOWN)
    with pytest.raises(Unavailable):
        write_report(memory, {"plan": "p"})


@pytest.mark.parametrize("body", [b"", b"done\n", b"[]", b"\xff\xfe"])
def test_success_of_another_program_is_refused(store: Store, body: bytes) -> None:
    store.put_if_absent(SUCCESS, body)
    with pytest.raises(CheckFailed, match=r"_SUCCESS is not batchjob's.*remove it"):
        read_success(store)


def test_report_replaces_an_older_one(store: Store) -> None:
    for plan in ("old", "new"):
        write_report(store, {"plan": plan})
    assert json.loads(store.read("_batchjob/report.json").data) == {"plan": "new"}


@pytest.mark.parametrize(
    ("change", "mismatches"),
    [
        ({"predictions/a": None}, ["predictions/a"]),
        ({"predictions/b": None}, ["predictions/b"]),
        ({"predictions/a": ObjectInfo("predictions/a", 100, "other")}, ["predictions/a"]),
        ({"predictions/c": ObjectInfo("predictions/c", 1, "etag-c")}, ["predictions/c"]),
        ({"predictions/c": ObjectInfo("predictions/c", 1)}, ["predictions/c"]),
        ({"predictions/c": ObjectInfo("predictions/c", 1), "predictions/a": None}, ["predictions/a", "predictions/c"]),
    ],
)
def test_missing_changed_and_added_parts_are_found(change: dict[str, ObjectInfo | None], mismatches: list[str]) -> None:
    memory = MemoryStore()
    write_success(memory, {"plan": "p"}, PARTS)
    found = read_success(memory)
    assert found is not None
    listing = {name: info for name, info in {**LISTING, **change}.items() if info is not None}
    assert find_part_mismatches(memory, found[0], listing) == mismatches


def test_only_the_success_that_was_read_is_deleted(memory: MemoryStore) -> None:
    delete_orphaned_success(memory, lambda: pytest.fail("there is none"))
    memory.put_if_absent(SUCCESS, b"{}")
    delete_orphaned_success(memory, lambda: False)
    assert memory.stored_keys() == [SUCCESS]

    def finish_another_plan() -> bool:
        memory.client().delete(SUCCESS)
        memory.client().put_if_absent(SUCCESS, b"{ }")
        return True

    delete_orphaned_success(memory, finish_another_plan)
    assert memory.read(SUCCESS).data == b"{ }"
    delete_orphaned_success(memory, lambda: True)
    assert memory.stored_keys() == []


def test_totals_add_up_over_parts() -> None:
    totals = Totals()
    totals.add(FOOTER)
    totals.add(
        replace(
            FOOTER,
            rows=6,
            failed=3,
            errors={"decode/truncated": 1, "fetch/not_found": 2},
            seconds={"wall": 2},
            truth={"images": 6},
        )
    )
    totals.add(replace(FOOTER, rows=0, failed=0, errors={}, seconds={}, truth={"images": 1, "right": 1}))
    assert totals.truth == {"images": 7, "right": 1}
    assert (totals.rows, totals.failed) == (10, 4)
    assert totals.errors == {"decode/truncated": 2, "fetch/not_found": 2}
    assert totals.seconds == {"wall": 3.5}
