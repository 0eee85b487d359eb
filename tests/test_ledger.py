"""What is committed: one PUT a part, a look after every doubtful answer, `_SUCCESS` last."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory_store import Fault, Killed, MemoryStore
from seaweed import Seaweed

from batchjob.errors import AttemptFailed, CheckFailed, InvalidJob, NotFound, Unavailable
from batchjob.output import error_rows, success
from batchjob.output.commit import CommitResult, delete_objects, list_parts, read_footer, read_footers
from batchjob.output.commit import commit_part as commit_of_commit
from batchjob.output.provenance import PartFooter
from batchjob.output.success import SUCCESS, Part, Totals
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.store import Store, open_store
from batchjob.types import ShardKey

KEY = ShardKey(index=17, id="5eed5eed5eed5eed", rows=4, chunk=0, offset=0)
MADE = PartFooter(
    plan="plan", shard=KEY.id, index=KEY.index, attempt="ours", revision=0, fingerprint="f", model="m",
    rows=4, failed=1, errors={"decode/truncated": 1}, seconds={"wall": 1.5}, versions={"torch": "2.15"},
)  # fmt: skip


def rows(made: PartFooter) -> pa.Table:
    """As many rows as the provenance says, the last ones failed."""
    good, failed = made.rows - made.failed, made.failed
    return pa.table(
        {
            "position": pa.array([made.index * 10 + n for n in range(made.rows)], pa.int64()),
            "uri": [f"{made.index}-{n}.jpg" for n in range(made.rows)],
            "error_stage": pa.array([None] * good + ["decode"] * failed, pa.string()),
            "error_type": pa.array([None] * good + ["truncated"] * failed, pa.string()),
            "error_message": pa.array([None] * good + ["cut short"] * failed, pa.string()),
        }
    ).replace_schema_metadata({PartFooter.KEY: made.to_json()})


def part(path: Path, made: PartFooter = MADE) -> Path:
    """A part on the local spool."""
    pq.write_table(rows(made), path)
    return path


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return part(tmp_path / "mine.parquet")


@pytest.fixture
def rivals(tmp_path: Path) -> Path:
    """The same shard, made by another attempt."""
    return part(tmp_path / "rivals.parquet", replace(MADE, attempt="rival", failed=0, errors={}))


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(params=["memory", "disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty output, of each kind."""
    if request.param == "memory":
        return MemoryStore()
    if request.param == "disk":
        return open_store(str(tmp_path / "out"))
    s3: Seaweed = request.getfixturevalue("s3")
    return open_store(s3.bucket() + "out")


def still_wanted() -> None:
    """The plan stands."""


def commit(store: Store, path: Path, wanted: Callable[[], None] = still_wanted) -> CommitResult:
    return commit_of_commit(store, KEY, path, MADE, wanted)


# --- the commit -----------------------------------------------------------------------------------------------------


def test_a_commit_is_one_put_of_the_whole_part(store: Store, mine: Path) -> None:
    done = commit(store, mine)
    assert KEY.part_key == "predictions/part-0000017-5eed5eed5eed5eed.parquet"
    assert (done.committed_here, done.footer) == (True, MADE)
    assert store.read(KEY.part_key).data == mine.read_bytes()
    assert list_parts(store) == {KEY.part_key: store.stat(KEY.part_key)}
    assert done.info.etag == store.stat(KEY.part_key).etag


def test_nothing_else_is_written(memory: MemoryStore, mine: Path) -> None:
    commit(memory, mine)
    assert memory.written_keys() == [KEY.part_key]


def test_a_rivals_part_of_the_same_shard_is_as_good(store: Store, mine: Path, rivals: Path) -> None:
    stat = store.put_if_absent(KEY.part_key, rivals)
    done = commit(store, mine)
    assert not done.committed_here
    assert (done.footer.attempt, done.footer.failed) == ("rival", 0)  # what stands is what is counted
    assert done.info.etag == stat.etag
    assert store.read(KEY.part_key).data == rivals.read_bytes()


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.REPEATED])
def test_a_lost_answer_is_looked_up_and_is_ours(memory: MemoryStore, mine: Path, fault: Fault) -> None:
    memory.inject("put_if_absent", KEY.part_key, fault)
    done = commit(memory, mine)
    assert (done.committed_here, done.footer) == (True, MADE)
    assert memory.written_keys() == [KEY.part_key]
    assert done.info == memory.stat(KEY.part_key)


@pytest.mark.parametrize("fault", [Fault.CONFLICT, Fault.DOWN])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_put_that_stored_nothing_is_tried_again(memory: MemoryStore, mine: Path, fault: Fault, times: int) -> None:
    memory.inject("put_if_absent", KEY.part_key, fault, times=times)
    assert commit(memory, mine).committed_here
    assert memory.written_keys() == [KEY.part_key] * (times + 1)
    assert memory.read(KEY.part_key).data == mine.read_bytes()


def test_exists_for_ever_with_nothing_there_fails_the_attempt(memory: MemoryStore, mine: Path) -> None:
    memory.inject("put_if_absent", KEY.part_key, Fault.CONFLICT, times=100)
    with pytest.raises(AttemptFailed, match="shows nothing"):
        commit(memory, mine)
    assert len(memory.written_keys()) < 10
    assert memory.stored_keys() == []


def test_a_store_that_stays_away_is_temporary_and_commits_nothing(memory: MemoryStore, mine: Path) -> None:
    memory.inject("put_if_absent", KEY.part_key, Fault.DOWN, times=100)
    with pytest.raises(Unavailable) as caught:
        commit(memory, mine)
    assert caught.value.exit_code == 75
    assert memory.stored_keys() == []


def test_a_look_that_fails_is_temporary_and_the_next_attempt_finds_the_part(memory: MemoryStore, mine: Path) -> None:
    memory.inject("put_if_absent", KEY.part_key, Fault.LOST)
    memory.inject("read_tail", KEY.part_key, Fault.DOWN)
    with pytest.raises(Unavailable):
        commit(memory, mine)
    assert commit(memory, mine).committed_here


@pytest.mark.parametrize("fault", [Fault.KILLED_BEFORE, Fault.KILLED_AFTER])
def test_killed_at_the_put_another_worker_ends_with_one_part(
    memory: MemoryStore, mine: Path, rivals: Path, fault: Fault
) -> None:
    dying = memory.client()
    dying.inject("put_if_absent", KEY.part_key, fault)
    with pytest.raises(Killed):
        commit(dying, rivals)
    done = commit(memory, mine)
    assert done.committed_here == (fault is Fault.KILLED_BEFORE)
    assert memory.stored_keys() == [KEY.part_key]
    assert done.footer.attempt == read_footer(memory, KEY.part_key).attempt


def test_a_rival_that_was_faster_by_a_moment(memory: MemoryStore, mine: Path, rivals: Path) -> None:
    memory.inject("put_if_absent", KEY.part_key, lambda: memory.client().put_if_absent(KEY.part_key, rivals))
    assert commit(memory, mine).footer.attempt == "rival"


@pytest.mark.parametrize("strange", [{"plan": "another"}, {"shard": "another"}])
def test_a_foreign_part_under_our_name_is_an_alarm(
    store: Store, mine: Path, tmp_path: Path, strange: dict[str, str]
) -> None:
    foreign = part(tmp_path / "foreign.parquet", replace(MADE, **strange))  # type: ignore[arg-type]
    store.put_if_absent(KEY.part_key, foreign)
    with pytest.raises(CheckFailed, match=r"part-0000017-.*holds shard .* of plan .*someone else writes") as caught:
        commit(store, mine)
    assert caught.value.exit_code == 3
    assert store.read(KEY.part_key).data == foreign.read_bytes()


def test_a_file_that_is_no_part_under_our_name_is_an_alarm(store: Store, mine: Path) -> None:
    store.put_if_absent(KEY.part_key, b"something else altogether")
    with pytest.raises(CheckFailed, match="not written by batchjob"):
        commit(store, mine)


def test_only_the_success_that_was_looked_at_is_cleared_away(memory: MemoryStore) -> None:
    success.delete_orphaned_success(memory, lambda: pytest.fail("there is none"))
    memory.put_if_absent(SUCCESS, b"{}")
    success.delete_orphaned_success(memory, lambda: False)
    assert memory.stored_keys() == [SUCCESS]

    def another_plan_comes_to_its_end() -> bool:
        memory.client().delete(SUCCESS)
        memory.client().put_if_absent(SUCCESS, b"{ }")
        return True

    success.delete_orphaned_success(memory, another_plan_comes_to_its_end)
    assert memory.read(SUCCESS).data == b"{ }"
    success.delete_orphaned_success(memory, lambda: True)
    assert memory.stored_keys() == []


def test_a_discarded_plan_is_asked_after_before_each_put(memory: MemoryStore, mine: Path) -> None:
    def gone() -> None:
        raise InvalidJob("discarded")

    with pytest.raises(InvalidJob, match="discarded"):
        commit(memory, mine, gone)
    assert memory.written_keys() == []
    answers = iter([still_wanted, gone])

    def soon_gone() -> None:
        next(answers)()

    memory.inject("put_if_absent", KEY.part_key, Fault.CONFLICT)
    with pytest.raises(InvalidJob, match="discarded"):
        commit(memory, mine, soon_gone)
    assert memory.stored_keys() == []


def test_a_part_deleted_between_two_looks_is_put_again(memory: MemoryStore, mine: Path, rivals: Path) -> None:
    memory.put_if_absent(KEY.part_key, rivals)
    memory.inject("stat", KEY.part_key, lambda: memory.client().delete(KEY.part_key))
    assert commit(memory, mine).committed_here


# --- what a part says of itself -------------------------------------------------------------------------------------


def test_a_footer_is_read_back(store: Store, mine: Path) -> None:
    store.put_if_absent(KEY.part_key, mine)
    assert read_footer(store, KEY.part_key) == MADE
    with pytest.raises(NotFound):
        read_footer(store, "predictions/part-0000018-none.parquet")


def test_only_the_end_of_a_part_is_read(memory: MemoryStore, tmp_path: Path) -> None:
    memory.put_if_absent(KEY.part_key, part(tmp_path / "p", replace(MADE, rows=50_000, failed=0)))
    read_footer(memory, KEY.part_key)
    assert {call.method for call in memory.calls} == {"put_if_absent", "read_tail"}


def test_a_footer_longer_than_the_first_look_is_read_whole(store: Store, tmp_path: Path) -> None:
    made = replace(MADE, versions={f"package-{n}": "1" * 40 for n in range(3000)})
    store.put_if_absent(KEY.part_key, part(tmp_path / "long.parquet", made))
    assert read_footer(store, KEY.part_key) == made


def parquet(path: Path, metadata: dict[str, str] | None) -> bytes:
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(metadata), path)
    return path.read_bytes()


def test_what_batchjob_did_not_write_is_said_to_be_so(memory: MemoryStore, tmp_path: Path) -> None:
    whole = part(tmp_path / "whole").read_bytes()
    bodies = [
        b"", b"PAR1", b"hello", b"\xff" * 1000, whole[:-10], whole[: len(whole) // 2], b"\xff" * 8 + b"PAR1",
        parquet(tmp_path / "a", None), parquet(tmp_path / "b", {"batchjob": "{"}),
        parquet(tmp_path / "c", {"batchjob": "[1]"}), parquet(tmp_path / "d", {"batchjob": '{"plan": "p"}'}),
    ]  # fmt: skip
    for n, body in enumerate(bodies):
        memory.put_if_absent(f"predictions/{n}", body)
        with pytest.raises(CheckFailed, match=rf"predictions/{n} was not written by batchjob.*remove it"):
            read_footer(memory, f"predictions/{n}")


def test_many_footers_come_in_the_order_asked(store: Store, tmp_path: Path) -> None:
    names = []
    for n in range(40):
        names.append(f"predictions/part-{n:07d}-x.parquet")
        store.put_if_absent(names[-1], part(tmp_path / f"{n}", replace(MADE, index=n)))
    asked = names[::-1]
    found = list(read_footers(store, asked))
    assert [name for name, _ in found] == asked
    assert [made.index for _, made in found] == list(range(39, -1, -1))
    with pytest.raises(NotFound):
        list(read_footers(store, [*names, "predictions/none"]))


def test_totals_add_up() -> None:
    totals = Totals()
    totals.add(MADE)
    totals.add(
        replace(
            MADE,
            rows=6,
            failed=3,
            errors={"decode/truncated": 1, "fetch/not_found": 2},
            seconds={"wall": 2},
            truth={"images": 6},
        )
    )
    totals.add(replace(MADE, rows=0, failed=0, errors={}, seconds={}, truth={"images": 1, "right": 1}))
    assert totals.truth == {"images": 7, "right": 1}
    assert (totals.rows, totals.failed) == (10, 4)
    assert totals.errors == {"decode/truncated": 2, "fetch/not_found": 2}
    assert totals.seconds == {"wall": 3.5}


def test_error_rows_come_in_plan_order(store: Store, tmp_path: Path) -> None:
    for index, failed in [(2, 1), (0, 2), (1, 0)]:
        made = replace(MADE, index=index, failed=failed, errors={"decode/truncated": failed} if failed else {})
        store.put_if_absent(f"predictions/part-{index:07d}-x.parquet", part(tmp_path / f"{index}", made))
    found = list(error_rows.read_error_rows(store))
    assert [row["position"] for row in found] == [2, 3, 23]
    assert found[0] == {
        "position": 2,
        "uri": "0-2.jpg",
        "error_stage": "decode",
        "error_type": "truncated",
        "error_message": "cut short",
    }


def test_of_a_part_with_errors_only_its_error_columns_are_read(memory: MemoryStore, tmp_path: Path) -> None:
    for index, failed in [(0, 2), (1, 0)]:
        made = replace(MADE, index=index, failed=failed)
        memory.put_if_absent(f"predictions/{index}.parquet", part(tmp_path / f"{index}", made))
    assert len(list(error_rows.read_error_rows(memory))) == 2
    assert [call.key for call in memory.calls if call.method == "open"] == ["predictions/0.parquet"]
    assert not [call for call in memory.calls if call.method == "read"]


def test_a_part_is_a_file_that_can_be_sought(store: Store, mine: Path) -> None:
    commit(store, mine)
    data = mine.read_bytes()
    with store.open(KEY.part_key) as file:
        file.seek(-4, 2)
        assert file.read() == b"PAR1"
        file.seek(10)
        assert file.read(20) == data[10:30]
    with pytest.raises(NotFound):
        store.open("predictions/none")


def test_many_objects_are_deleted_while_life_is_shown(store: Store) -> None:
    names = [f"predictions/{n}" for n in range(40)]
    for name in names:
        store.put_if_absent(name, b"x")
    beats: list[int] = []
    assert delete_objects(store, names, lambda: beats.append(1)) == 40
    assert len(beats) >= 40
    assert list_parts(store) == {}


# --- _SUCCESS -------------------------------------------------------------------------------------------------------

PARTS = [Part("predictions/a", 4, 1, "etag-a", 100), Part("predictions/b", 3, 0, None, 90)]
THERE = {
    "predictions/a": ObjectInfo("predictions/a", 100, "etag-a", "1"),
    "predictions/b": ObjectInfo("predictions/b", 90),
}


def test_success_is_put_and_read_back(store: Store) -> None:
    assert success.read_success(store) is None
    success.write_success(store, {"plan": "p", "counts": {"planned": 7}}, PARTS)
    found = success.read_success(store)
    assert found is not None
    facts, stat = found
    assert facts["plan"] == "p"
    assert facts["parts"][0] == {"name": "predictions/a", "rows": 4, "failed": 1, "etag": "etag-a", "size": 100}
    assert (stat.uri, stat.version) == (SUCCESS, store.stat(SUCCESS).version)
    assert success.find_part_mismatches(facts, THERE) == []


def test_the_same_success_is_not_written_twice(memory: MemoryStore) -> None:
    success.write_success(memory, {"plan": "p"}, PARTS)
    before = memory.read(SUCCESS)
    success.write_success(memory, {"plan": "p"}, PARTS)
    assert memory.read(SUCCESS) == before


def test_a_success_that_says_something_else_is_replaced(store: Store) -> None:
    success.write_success(store, {"plan": "old"}, PARTS[:1])
    success.write_success(store, {"plan": "new"}, PARTS)
    found = success.read_success(store)
    assert found is not None
    assert (found[0]["plan"], len(found[0]["parts"])) == ("new", 2)


def test_it_is_replaced_under_the_version_that_was_read(memory: MemoryStore) -> None:
    success.write_success(memory, {"plan": "old"}, PARTS)
    rival = memory.client()
    memory.inject("replace_if_match", SUCCESS, lambda: success.write_success(rival, {"plan": "theirs"}, PARTS))
    success.write_success(memory, {"plan": "new"}, PARTS)
    assert memory.written_keys().count(SUCCESS) > 3  # the first replacement lost, and was tried on what stood then
    assert json.loads(memory.read(SUCCESS).data)["plan"] == "new"


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("fault", [Fault.REPEATED, Fault.CONFLICT])
def test_no_answer_to_a_success_is_believed(memory: MemoryStore, there: bool, fault: Fault) -> None:
    if there:
        success.write_success(memory, {"plan": "old"}, PARTS)
    memory.inject("replace_if_match" if there else "put_if_absent", SUCCESS, fault)
    success.write_success(memory, {"plan": "new"}, PARTS)
    assert json.loads(memory.read(SUCCESS).data)["plan"] == "new"


def test_a_success_that_cannot_be_written_is_said(memory: MemoryStore) -> None:
    memory.inject("put_if_absent", SUCCESS, Fault.CONFLICT, times=100)
    with pytest.raises(AttemptFailed, match="_SUCCESS could not be written"):
        success.write_success(memory, {"plan": "p"}, PARTS)
    memory.inject("put_if_absent", "_batchjob/report.json", Fault.DOWN)
    with pytest.raises(Unavailable):
        success.write_report(memory, {"plan": "p"})


@pytest.mark.parametrize("body", [b"", b"done\n", b"[]", b"\xff\xfe"])
def test_a_success_that_another_tool_put_there_is_said(store: Store, body: bytes) -> None:
    store.put_if_absent(SUCCESS, body)
    with pytest.raises(CheckFailed, match=r"_SUCCESS is not batchjob's.*remove it"):
        success.read_success(store)


def test_a_report_takes_the_place_of_an_older_one(store: Store) -> None:
    for plan in ("old", "new"):
        success.write_report(store, {"plan": plan})
    assert json.loads(store.read("_batchjob/report.json").data) == {"plan": "new"}


@pytest.mark.parametrize(
    ("change", "odd"),
    [
        ({"predictions/a": None}, ["predictions/a"]),
        ({"predictions/b": None}, ["predictions/b"]),
        ({"predictions/a": ObjectInfo("predictions/a", 100, "other")}, ["predictions/a"]),
        ({"predictions/c": ObjectInfo("predictions/c", 1, "etag-c")}, ["predictions/c"]),
        ({"predictions/c": ObjectInfo("predictions/c", 1)}, ["predictions/c"]),
        ({"predictions/c": ObjectInfo("predictions/c", 1), "predictions/a": None}, ["predictions/a", "predictions/c"]),
    ],
)
def test_parts_that_went_changed_or_came_since_success(change: dict[str, ObjectInfo | None], odd: list[str]) -> None:
    memory = MemoryStore()
    success.write_success(memory, {"plan": "p"}, PARTS)
    found = success.read_success(memory)
    assert found is not None
    there = {name: stat for name, stat in {**THERE, **change}.items() if stat is not None}
    assert success.find_part_mismatches(found[0], there) == odd
