"""Commit protocol, footers and error rows, on a store in memory, on disk and on S3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjob.errors import AttemptFailed, CheckFailed, InvalidJob, NotFound, Unavailable
from batchjob.output import error_rows
from batchjob.output.commit import (
    CommitResult,
    commit_part,
    delete_objects,
    list_parts,
    read_footer,
    read_footers,
)
from batchjob.output.provenance import PartFooter
from batchjob.storage.store import Store
from batchjob.types import ShardKey
from tests.support.memory_store import Fault, Killed, MemoryStore
from tests.support.part_footers import make_footer

KEY = ShardKey(index=17, id="5eed5eed5eed5eed", rows=4, chunk=0, offset=0)
FOOTER = make_footer(
    KEY,
    attempt="ours",
    failed=1,
    errors={"decode/truncated": 1},
    seconds={"wall": 1.5},
    versions={"torch": "2.15"},
)


def make_rows(footer: PartFooter) -> pa.Table:
    """Make as many rows as the footer says; the last ones are error rows."""
    good, failed = footer.rows - footer.failed, footer.failed
    return pa.table(
        {
            "position": pa.array([footer.index * 10 + n for n in range(footer.rows)], pa.int64()),
            "uri": [f"{footer.index}-{n}.jpg" for n in range(footer.rows)],
            "error_stage": pa.array([None] * good + ["decode"] * failed, pa.string()),
            "error_type": pa.array([None] * good + ["truncated"] * failed, pa.string()),
            "error_message": pa.array([None] * good + ["cut short"] * failed, pa.string()),
        }
    ).replace_schema_metadata({PartFooter.KEY: footer.to_json()})


def write_part(path: Path, footer: PartFooter = FOOTER) -> Path:
    """Write a part to a local file."""
    pq.write_table(make_rows(footer), path)
    return path


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return write_part(tmp_path / "mine.parquet")


@pytest.fixture
def other_part(tmp_path: Path) -> Path:
    """The part of the same shard by another attempt."""
    return write_part(tmp_path / "rivals.parquet", replace(FOOTER, attempt="rival", failed=0, errors={}))


def plan_is_current() -> None:
    """Raise nothing: the plan has not been discarded."""


def commit(store: Store, path: Path, raise_if_discarded: Callable[[], None] = plan_is_current) -> CommitResult:
    return commit_part(store, KEY, path, FOOTER, raise_if_discarded)


# --- the commit -------------------------------------------------------------------------------------------------------


def test_commit_is_one_put_of_the_whole_part(store: Store, part: Path) -> None:
    done = commit(store, part)
    assert KEY.part_key == "predictions/part-0000017-5eed5eed5eed5eed.parquet"
    assert (done.committed_here, done.footer) == (True, FOOTER)
    assert store.read(KEY.part_key).data == part.read_bytes()
    assert list_parts(store) == {KEY.part_key: store.stat(KEY.part_key)}
    assert done.info.etag == store.stat(KEY.part_key).etag


def test_commit_writes_nothing_else(memory: MemoryStore, part: Path) -> None:
    commit(memory, part)
    assert memory.written_keys() == [KEY.part_key]


def test_part_of_another_attempt_counts_as_committed(store: Store, part: Path, other_part: Path) -> None:
    stat = store.put_if_absent(KEY.part_key, other_part)
    done = commit(store, part)
    assert not done.committed_here
    assert (done.footer.attempt, done.footer.failed) == ("rival", 0)  # the committed part is the one that counts
    assert done.info.etag == stat.etag
    assert store.read(KEY.part_key).data == other_part.read_bytes()


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.REPEATED])
def test_lost_answer_is_resolved_by_the_footer(memory: MemoryStore, part: Path, fault: Fault) -> None:
    memory.inject("put_if_absent", KEY.part_key, fault)
    done = commit(memory, part)
    assert (done.committed_here, done.footer) == (True, FOOTER)
    assert memory.written_keys() == [KEY.part_key]
    assert done.info == memory.stat(KEY.part_key)


@pytest.mark.parametrize("fault", [Fault.CONFLICT, Fault.DOWN])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_put_that_stored_nothing_is_retried(memory: MemoryStore, part: Path, fault: Fault, times: int) -> None:
    memory.inject("put_if_absent", KEY.part_key, fault, times=times)
    assert commit(memory, part).committed_here
    assert memory.written_keys() == [KEY.part_key] * (times + 1)
    assert memory.read(KEY.part_key).data == part.read_bytes()


def test_repeated_conflict_without_an_object_fails_the_attempt(memory: MemoryStore, part: Path) -> None:
    memory.inject("put_if_absent", KEY.part_key, Fault.CONFLICT, times=100)
    with pytest.raises(AttemptFailed, match="shows nothing"):
        commit(memory, part)
    assert len(memory.written_keys()) < 10
    assert memory.stored_keys() == []


def test_unavailable_store_is_temporary_and_commits_nothing(memory: MemoryStore, part: Path) -> None:
    memory.inject("put_if_absent", KEY.part_key, Fault.DOWN, times=100)
    with pytest.raises(Unavailable) as caught:
        commit(memory, part)
    assert caught.value.exit_code == 75
    assert memory.stored_keys() == []


def test_next_attempt_finds_a_part_whose_check_failed(memory: MemoryStore, part: Path) -> None:
    memory.inject("put_if_absent", KEY.part_key, Fault.LOST)
    memory.inject("read_tail", KEY.part_key, Fault.DOWN)
    with pytest.raises(Unavailable):
        commit(memory, part)
    assert commit(memory, part).committed_here


@pytest.mark.parametrize("fault", [Fault.KILLED_BEFORE, Fault.KILLED_AFTER])
def test_kill_during_the_put_leaves_one_part(memory: MemoryStore, part: Path, other_part: Path, fault: Fault) -> None:
    dying = memory.client()
    dying.inject("put_if_absent", KEY.part_key, fault)
    with pytest.raises(Killed):
        commit(dying, other_part)
    done = commit(memory, part)
    assert done.committed_here == (fault is Fault.KILLED_BEFORE)
    assert memory.stored_keys() == [KEY.part_key]
    assert done.footer.attempt == read_footer(memory, KEY.part_key).attempt


def test_attempt_that_puts_its_part_first_wins(memory: MemoryStore, part: Path, other_part: Path) -> None:
    memory.inject("put_if_absent", KEY.part_key, lambda: memory.client().put_if_absent(KEY.part_key, other_part))
    assert commit(memory, part).footer.attempt == "rival"


@pytest.mark.parametrize("strange", [{"plan": "another"}, {"shard": "another"}])
def test_part_of_another_plan_or_shard_is_refused(
    store: Store, part: Path, tmp_path: Path, strange: dict[str, str]
) -> None:
    foreign = write_part(tmp_path / "foreign.parquet", replace(FOOTER, **strange))  # type: ignore[arg-type]
    store.put_if_absent(KEY.part_key, foreign)
    with pytest.raises(CheckFailed, match=r"part-0000017-.*holds shard .* of plan .*someone else writes") as caught:
        commit(store, part)
    assert caught.value.exit_code == 3
    assert store.read(KEY.part_key).data == foreign.read_bytes()


def test_file_that_is_not_a_part_is_refused(store: Store, part: Path) -> None:
    store.put_if_absent(KEY.part_key, b"something else altogether")
    with pytest.raises(CheckFailed, match="not written by batchjob"):
        commit(store, part)


def test_discarded_plan_is_checked_before_each_put(memory: MemoryStore, part: Path) -> None:
    def raise_discarded() -> None:
        raise InvalidJob("discarded")

    with pytest.raises(InvalidJob, match="discarded"):
        commit(memory, part, raise_discarded)
    assert memory.written_keys() == []
    answers = iter([plan_is_current, raise_discarded])

    def discard_after_first_call() -> None:
        next(answers)()

    memory.inject("put_if_absent", KEY.part_key, Fault.CONFLICT)
    with pytest.raises(InvalidJob, match="discarded"):
        commit(memory, part, discard_after_first_call)
    assert memory.stored_keys() == []


def test_part_deleted_between_two_reads_is_put_again(memory: MemoryStore, part: Path, other_part: Path) -> None:
    memory.put_if_absent(KEY.part_key, other_part)
    memory.inject("stat", KEY.part_key, lambda: memory.client().delete(KEY.part_key))
    assert commit(memory, part).committed_here


# --- footers and error rows -------------------------------------------------------------------------------------------


def test_footer_is_read_back(store: Store, part: Path) -> None:
    store.put_if_absent(KEY.part_key, part)
    assert read_footer(store, KEY.part_key) == FOOTER
    with pytest.raises(NotFound):
        read_footer(store, "predictions/part-0000018-none.parquet")


def test_only_the_end_of_a_part_is_read_for_its_footer(memory: MemoryStore, tmp_path: Path) -> None:
    memory.put_if_absent(KEY.part_key, write_part(tmp_path / "p", replace(FOOTER, rows=50_000, failed=0)))
    read_footer(memory, KEY.part_key)
    assert {call.method for call in memory.calls} == {"put_if_absent", "read_tail"}


def test_long_footer_is_read_in_full(store: Store, tmp_path: Path) -> None:
    made = replace(FOOTER, versions={f"package-{n}": "1" * 40 for n in range(3000)})
    store.put_if_absent(KEY.part_key, write_part(tmp_path / "long.parquet", made))
    assert read_footer(store, KEY.part_key) == made


def write_parquet(path: Path, metadata: dict[str, str] | None) -> bytes:
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(metadata), path)
    return path.read_bytes()


def test_file_of_another_program_is_named(memory: MemoryStore, tmp_path: Path) -> None:
    whole = write_part(tmp_path / "whole").read_bytes()
    bodies = [
        b"", b"PAR1", b"hello", b"\xff" * 1000, whole[:-10], whole[: len(whole) // 2], b"\xff" * 8 + b"PAR1",
        write_parquet(tmp_path / "a", None), write_parquet(tmp_path / "b", {"batchjob": "{"}),
        write_parquet(tmp_path / "c", {"batchjob": "[1]"}),
        write_parquet(tmp_path / "d", {"batchjob": '{"plan": "p"}'}),
    ]  # fmt: skip
    for n, body in enumerate(bodies):
        memory.put_if_absent(f"predictions/{n}", body)
        with pytest.raises(CheckFailed, match=rf"predictions/{n} was not written by batchjob.*remove it"):
            read_footer(memory, f"predictions/{n}")


def test_footers_come_in_the_order_of_the_keys(store: Store, tmp_path: Path) -> None:
    names = []
    for n in range(40):
        names.append(f"predictions/part-{n:07d}-x.parquet")
        store.put_if_absent(names[-1], write_part(tmp_path / f"{n}", replace(FOOTER, index=n)))
    asked = names[::-1]
    found = list(read_footers(store, asked))
    assert [name for name, _ in found] == asked
    assert [made.index for _, made in found] == list(range(39, -1, -1))
    with pytest.raises(NotFound):
        list(read_footers(store, [*names, "predictions/none"]))


def test_error_rows_come_in_plan_order(store: Store, tmp_path: Path) -> None:
    for index, failed in [(2, 1), (0, 2), (1, 0)]:
        made = replace(FOOTER, index=index, failed=failed, errors={"decode/truncated": failed} if failed else {})
        store.put_if_absent(f"predictions/part-{index:07d}-x.parquet", write_part(tmp_path / f"{index}", made))
    found = list(error_rows.read_error_rows(store))
    assert [row["position"] for row in found] == [2, 3, 23]
    assert found[0] == {
        "position": 2,
        "uri": "0-2.jpg",
        "error_stage": "decode",
        "error_type": "truncated",
        "error_message": "cut short",
    }


def test_only_error_columns_of_parts_with_errors_are_read(memory: MemoryStore, tmp_path: Path) -> None:
    for index, failed in [(0, 2), (1, 0)]:
        made = replace(FOOTER, index=index, failed=failed)
        memory.put_if_absent(f"predictions/{index}.parquet", write_part(tmp_path / f"{index}", made))
    assert len(list(error_rows.read_error_rows(memory))) == 2
    assert [call.key for call in memory.calls if call.method == "open"] == ["predictions/0.parquet"]
    assert not [call for call in memory.calls if call.method == "read"]


def test_part_is_a_seekable_file(store: Store, part: Path) -> None:
    commit(store, part)
    data = part.read_bytes()
    with store.open(KEY.part_key) as file:
        file.seek(-4, 2)
        assert file.read() == b"PAR1"
        file.seek(10)
        assert file.read(20) == data[10:30]
    with pytest.raises(NotFound):
        store.open("predictions/none")


def test_heartbeat_is_called_while_objects_are_deleted(store: Store) -> None:
    names = [f"predictions/{n}" for n in range(40)]
    for name in names:
        store.put_if_absent(name, b"x")
    beats: list[int] = []
    assert delete_objects(store, names, lambda: beats.append(1)) == 40
    assert len(beats) >= 40
    assert list_parts(store) == {}
