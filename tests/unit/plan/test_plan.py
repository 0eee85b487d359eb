"""Plans: heads, chunks and contracts are written once, also by killed, resumed and concurrent drivers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest

import batchjob
from batchjob.driver.driver import make_plan
from batchjob.driver.progress import NoProgress
from batchjob.errors import InvalidJob, NotFound, Unavailable
from batchjob.job.fingerprint import diff_fingerprints
from batchjob.plan.chunks import Chunk, extend_plan, read_chunks
from batchjob.plan.contract import Contract, put_or_read, verify
from batchjob.plan.head import (
    FORMAT_VERSION,
    PlanHead,
    discard_plan,
    is_discarded,
    is_plan_id_discarded,
    new_head,
    put_head,
    read_current_head,
)
from batchjob.plan.reader import PlanReader
from batchjob.sources.source import REF_FIELDS
from batchjob.storage.store import Store
from batchjob.types import Cursor
from tests.support.memory_store import Fault, Killed, MemoryStore

SHARD_ROWS, CHUNK_ROWS = 3, 6
SCHEMA = pa.schema([*REF_FIELDS, pa.field("sku", pa.string())])


@dataclass
class Listing:
    """A source of `rows` images in batches of `batch` rows, whose version may change."""

    rows: int
    batch: int = 4
    version: str = "v1"
    cursors: list[Cursor] = field(default_factory=list)

    def refs(self, after: Cursor) -> Iterator[pa.RecordBatch]:
        self.cursors.append(after)
        for start in range(after.rows, self.rows, self.batch):
            yield self._batch(range(start, min(start + self.batch, self.rows)))
        if after.rows >= self.rows:
            yield self._batch(range(0))

    def _batch(self, rows: range) -> pa.RecordBatch:
        columns = {
            "uri": [f"{n:04d}.jpg" for n in rows],
            "location": [f"s3://lake/{self.version}/{n:04d}.jpg" for n in rows],
            "size": [1000 + n for n in rows],
            "etag": [f"e{n}" if n % 2 else None for n in rows],
            "sku": [f"sku-{n}" if n % 5 else None for n in rows],
        }
        return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def do_nothing() -> None:
    """Check nothing: the source has not changed."""


def make_head(number: int = 0, shard_size: int = SHARD_ROWS, **facts: object) -> PlanHead:
    defaults = {"job": {"name": "tags"}, "fingerprint": {"model": {"name": "resnet18"}}}
    return new_head(number, shard_size=shard_size, **{**defaults, "source_version": None, "batchjob": "0.1.0", **facts})


def write_plan(store: Store, listing: Listing, head: PlanHead | None = None) -> tuple[PlanHead, list[Chunk]]:
    """Write a plan like a driver: read or put its head, then extend it by every chunk."""
    number, there = read_current_head(store)
    head = there or put_head(store, head or make_head(number))
    return head, list(extend_plan(store, head, listing.refs, do_nothing))


def key_of_chunk(number: int) -> str:
    return f"_batchjob/plans/0000/chunk-{number:07d}.arrow"


HEAD_KEY, TOMBSTONE_KEY = "_batchjob/plans/0000/head.json", "_batchjob/plans/0000/discarded"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks of two shards in place of 65,536 rows."""
    # The additional row is not used, because chunks hold whole shards.
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", CHUNK_ROWS + 1)


# --- chunks and shards -----------------------------------------------------------------------------------------------


def test_every_image_is_planned_once_in_order(store: Store) -> None:
    head, chunks = write_plan(store, Listing(14))
    keys = [key for chunk in chunks for key in chunk.shards]
    assert [(key.index, key.rows, key.chunk, key.offset) for key in keys] == [
        (0, 3, 0, 0), (1, 3, 0, 3), (2, 3, 1, 0), (3, 3, 1, 3), (4, 2, 2, 0),
    ]  # fmt: skip
    reader = PlanReader(store, head)
    shards = [reader.read_shard(key) for key in keys]
    refs = [ref for shard in shards for ref in shard.refs]
    assert [ref.position for ref in refs] == list(range(14))
    assert [ref.uri for ref in refs] == [f"{n:04d}.jpg" for n in range(14)]
    assert (refs[7].location, refs[7].size, refs[7].etag) == ("s3://lake/v1/0007.jpg", 1007, "e7")
    assert refs[8].etag is None
    skus = [sku for shard in shards for sku in shard.passthrough.column("sku").to_pylist()]
    assert skus == [f"sku-{n}" if n % 5 else None for n in range(14)]
    assert reader.passthrough_schema == pa.schema([SCHEMA.field("sku")])
    assert list(read_chunks(store, head)) == chunks
    assert read_current_head(store) == (0, head)


@pytest.mark.parametrize(
    ("rows", "chunk_rows"),
    [(1, [1]), (5, [5]), (6, [6]), (7, [6, 1]), (12, [6, 6]), (13, [6, 6, 1])],
)
@pytest.mark.parametrize("batch", [1, 4, 6, 50])
def test_chunks_hold_whole_shards_and_only_the_final_one_is_last(
    memory: MemoryStore, rows: int, chunk_rows: list[int], batch: int
) -> None:
    _, chunks = write_plan(memory, Listing(rows, batch))
    ends = [chunk.end_cursor.rows for chunk in chunks]
    assert [end - chunk.first_row for end, chunk in zip(ends, chunks, strict=True)] == chunk_rows
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunk_rows) - 1) + [True]
    assert [chunk.number for chunk in chunks] == list(range(len(chunk_rows)))
    assert [chunk.end_cursor.last for chunk in chunks] == [f"s3://lake/v1/{end - 1:04d}.jpg" for end in ends]


def test_shard_larger_than_the_chunk_limit_is_a_chunk(memory: MemoryStore) -> None:
    _, chunks = write_plan(memory, Listing(25), make_head(shard_size=10))
    assert [[key.rows for key in chunk.shards] for chunk in chunks] == [[10], [10], [5]]


def test_empty_plan_has_one_shard_of_no_rows(store: Store) -> None:
    head, chunks = write_plan(store, Listing(0))
    assert [(chunk.is_last, [key.rows for key in chunk.shards]) for chunk in chunks] == [(True, [0])]
    shard = PlanReader(store, head).read_shard(chunks[0].shards[0])
    assert (shard.refs, shard.passthrough.schema.names) == ((), ["sku"])


def test_chunk_of_thousands_of_shards_is_read(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 5000)
    head, chunks = write_plan(memory, Listing(6000, batch=1000), make_head(shard_size=1))
    assert [len(chunk.shards) for chunk in chunks] == [5000, 1000]
    assert PlanReader(memory, head).read_shard(chunks[1].shards[-1]).refs[0].position == 5999
    assert list(read_chunks(memory, head)) == chunks


def test_first_refs_cross_shards(memory: MemoryStore) -> None:
    head, _ = write_plan(memory, Listing(14))
    reader = PlanReader(memory, head)
    assert [ref.position for ref in reader.read_first_refs(5)] == [0, 1, 2, 3, 4]
    assert reader.read_first_refs(2) == reader.read_first_refs(5)[:2]


def test_chunk_holds_the_digest_of_the_previous_one(store: Store) -> None:
    head, chunks = write_plan(store, Listing(14))
    digests = [hashlib.sha256(store.read(key_of_chunk(n)).data).hexdigest() for n in range(3)]
    assert [chunk.previous_digest for chunk in chunks] == ["", *digests[:2]]
    assert [chunk.previous_digest for chunk in read_chunks(store, head)] == ["", *digests[:2]]


def test_shard_ids_depend_on_plan_index_and_members(memory: MemoryStore) -> None:
    def shard_ids(head: PlanHead, listing: Listing) -> list[str]:
        _, chunks = write_plan(MemoryStore(), listing, head)
        return [key.id for chunk in chunks for key in chunk.shards]

    head = make_head()
    first = shard_ids(head, Listing(14))
    assert len(set(first)) == 5
    assert first == shard_ids(head, Listing(14, batch=1))  # independent of the source's batches
    assert not set(first) & set(shard_ids(make_head(), Listing(14)))  # another plan of the same job
    assert not set(first) & set(shard_ids(head, Listing(14, version="v2")))  # other members
    assert first[:4] == shard_ids(head, Listing(15))[:4]


def test_shards_of_the_same_images_have_different_ids(memory: MemoryStore) -> None:
    """A manifest may name an image several times."""
    one = next(Listing(1).refs(Cursor()))
    head = put_head(memory, make_head())
    chunks = extend_plan(memory, head, lambda after: iter([one] * 12), do_nothing)
    assert len({key.id for chunk in chunks for key in chunk.shards}) == 4


def test_source_without_a_batch_is_an_error(memory: MemoryStore) -> None:
    head = put_head(memory, make_head())
    with pytest.raises(InvalidJob, match="no batch"):
        list(extend_plan(memory, head, lambda after: iter(()), do_nothing))


# --- the head --------------------------------------------------------------------------------------------------------


def test_head_is_stored_and_read_back(store: Store) -> None:
    head = make_head(fingerprint={"model": {"name": "resnet18"}, "task": {"top_k": 5}}, source_version="digest")
    assert read_current_head(store) == (0, None)
    assert put_head(store, head) == head
    assert read_current_head(store) == (0, head)
    assert len({make_head().plan for _ in range(50)}) == 50
    assert json.loads(store.read(HEAD_KEY).data)["format"] == FORMAT_VERSION


def test_second_driver_adopts_the_stored_head(store: Store) -> None:
    first = put_head(store, make_head())
    assert put_head(store, make_head()) == first


def test_head_is_not_put_beside_parts_without_a_plan(store: Store) -> None:
    store.put_if_absent("predictions/part-0000000-old.parquet", b"rows")
    with pytest.raises(
        InvalidJob, match=r"part-0000000-old\.parquet is there but no plan is.*choose another"
    ) as caught:
        put_head(store, make_head())
    assert caught.value.exit_code == 2
    assert read_current_head(store) == (0, None)


def test_stale_parts_of_a_discarded_plan_are_deleted_before_the_head_is_put(store: Store) -> None:
    late = "predictions/part-0000000-late.parquet"
    store.put_if_absent(late, b"rows")
    cleared = list[str]()

    def delete_parts(names: list[str]) -> None:
        cleared.extend(names)
        store.delete(late)

    head = make_head()
    assert put_head(store, head, delete_parts) == head
    assert cleared == [late]
    assert list(store.list("predictions/")) == []


def test_driver_adopts_a_head_that_a_rival_puts_meanwhile(memory: MemoryStore) -> None:
    rival = make_head()

    def store_as_rival() -> None:
        put_head(memory.client(), rival)
        memory.client().put_if_absent("predictions/part-0000000-theirs.parquet", b"rows")

    memory.inject("list", "predictions/", store_as_rival)
    assert put_head(memory, make_head()) == rival


@pytest.mark.parametrize("fault", [Fault.REPEATED, Fault.CONFLICT])
def test_already_exists_about_a_head_is_verified(memory: MemoryStore, fault: Fault) -> None:
    memory.inject("put_if_absent", HEAD_KEY, fault)
    head = make_head()
    assert put_head(memory, head) == head
    assert read_current_head(memory) == (0, head)


def test_store_that_always_answers_exists_is_temporary(memory: MemoryStore) -> None:
    memory.inject("put_if_absent", HEAD_KEY, Fault.CONFLICT, times=100)
    with pytest.raises(Unavailable, match=r"head\.json.*run again") as caught:
        put_head(memory, make_head())
    assert caught.value.exit_code == 75
    assert len(memory.written_keys()) < 10


def test_unknown_format_names_the_version_that_can_finish_it(store: Store) -> None:
    head = make_head(batchjob="7.1.0")
    store.put_if_absent(HEAD_KEY, json.dumps({**vars(head), "format": 99, "colour": "blue"}).encode())
    with pytest.raises(
        InvalidJob, match=rf"format 99, this version knows {FORMAT_VERSION}.*batchjob 7\.1\.0"
    ) as caught:
        read_current_head(store)
    assert caught.value.exit_code == 2
    with pytest.raises(InvalidJob, match=r"batchjob 7\.1\.0"):
        put_head(store, make_head())
    # Once it is discarded by the version that knows it, a new plan can follow.
    store.put_if_absent(TOMBSTONE_KEY, b"{}")
    assert read_current_head(store) == (1, None)
    assert is_plan_id_discarded(store, head.plan)


def test_stored_fingerprint_shows_differences(store: Store) -> None:
    there = {"model": {"name": "resnet18", "weights": "V1"}, "preprocess": {"resize": None, "mean": [0.5, 0.5, 0.5]}}
    put_head(store, make_head(fingerprint=there))
    _, head = read_current_head(store)
    assert head is not None
    assert diff_fingerprints(head.fingerprint, there) == []
    other = {**there, "model": {"name": "resnet18", "weights": "V2"}}
    assert diff_fingerprints(head.fingerprint, other) == ["model.weights: V1 there, V2 here"]


# --- adopted and resumed plans ---------------------------------------------------------------------------------------


def test_complete_plan_is_adopted_without_listing_its_source(store: Store) -> None:
    _, chunks = write_plan(store, Listing(14))
    listing = Listing(99)

    def fail_if_called() -> None:
        raise AssertionError("the source was asked for")

    _, head = read_current_head(store)
    assert head is not None
    assert list(extend_plan(store, head, listing.refs, fail_if_called)) == chunks
    assert listing.cursors == []


@pytest.mark.parametrize("fault", [Fault.KILLED_BEFORE, Fault.KILLED_AFTER])
@pytest.mark.parametrize("puts", [0, 1, 2, 3])
def test_next_driver_completes_the_same_plan_after_a_kill_at_any_put(puts: int, fault: Fault) -> None:
    head = make_head()
    _, whole = write_plan(MemoryStore(), Listing(14), head)
    memory = MemoryStore()
    memory.inject("put_if_absent", "*", fault, skip=puts)
    with pytest.raises(Killed):
        write_plan(memory, Listing(14), head)
    left = memory.stored_keys()
    listing, again = Listing(14, batch=5), memory.client()
    assert write_plan(again, listing, head) == (head, whole)
    assert sorted([*left, *again.written_keys()]) == sorted(
        [HEAD_KEY, *(key_of_chunk(n) for n in range(3))]
    )  # each written once
    complete = fault is Fault.KILLED_AFTER and puts == 3
    assert [after.rows for after in listing.cursors] == ([] if complete else [CHUNK_ROWS * max(0, len(left) - 1)])


def test_chunk_is_yielded_only_once_it_is_stored(memory: MemoryStore) -> None:
    head = put_head(memory, make_head())
    for chunk in extend_plan(memory, head, Listing(14).refs, do_nothing):
        assert key_of_chunk(chunk.number) in memory.stored_keys()


@pytest.mark.parametrize("fault", [Fault.REPEATED, Fault.CONFLICT])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_already_exists_about_a_chunk_is_verified(memory: MemoryStore, number: int, fault: Fault) -> None:
    memory.inject("put_if_absent", key_of_chunk(number), fault)
    head, listing = make_head(), Listing(14)
    _, chunks = write_plan(memory, listing, head)
    assert chunks == write_plan(MemoryStore(), Listing(14), head)[1]
    assert len(listing.cursors) == 1  # our own chunk, found again, does not restart the listing


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.DOWN])
def test_driver_resumes_after_a_lost_answer(memory: MemoryStore, fault: Fault) -> None:
    memory.inject("put_if_absent", key_of_chunk(1), fault)
    head = make_head()
    with pytest.raises(Unavailable):
        write_plan(memory, Listing(14), head)
    assert write_plan(memory, Listing(14)) == (head, write_plan(MemoryStore(), Listing(14), head)[1])


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_driver_adopts_chunks_that_a_rival_puts_meanwhile(memory: MemoryStore, ahead: int) -> None:
    """The rival lists one more image, so that its chunks differ from ours."""
    head = put_head(memory, make_head())
    theirs: list[Chunk] = []

    def store_as_rival() -> None:
        rival = extend_plan(memory.client(), head, Listing(15, version="v2").refs, do_nothing)
        theirs.extend(islice(rival, ahead))

    memory.inject("put_if_absent", key_of_chunk(0), store_as_rival)
    mine = list(extend_plan(memory, head, Listing(14).refs, do_nothing))
    assert mine[:ahead] == theirs
    assert mine == list(read_chunks(memory, head))
    assert [chunk.is_last for chunk in mine] == [False, False, True]
    rows = [key.rows for chunk in mine for key in chunk.shards]
    assert sum(rows) == (15 if ahead == 3 else 14)


def test_two_concurrent_drivers_make_one_plan(memory: MemoryStore) -> None:
    head = put_head(memory, make_head())
    one = extend_plan(memory, head, Listing(30, batch=7).refs, do_nothing)
    two = extend_plan(memory.client(), head, Listing(30, batch=2).refs, do_nothing)
    assert list(zip(one, two, strict=True)) == [(chunk, chunk) for chunk in read_chunks(memory, head)]


def test_plan_ends_where_a_shrunk_source_ends(memory: MemoryStore) -> None:
    memory.inject("put_if_absent", key_of_chunk(1), Fault.KILLED_BEFORE)
    head = make_head()
    with pytest.raises(Killed):
        write_plan(memory, Listing(14), head)
    _, chunks = write_plan(memory, Listing(CHUNK_ROWS))
    assert [(len(chunk.shards), chunk.end_cursor.rows, chunk.is_last) for chunk in chunks] == [
        (2, 6, False),
        (0, 6, True),
    ]
    assert chunks[-1].end_cursor == chunks[0].end_cursor


def check_version_of(listing: Listing, head: PlanHead) -> Callable[[], None]:
    """Return the check that a driver passes: it raises if the source has another version."""

    def check() -> None:
        if listing.version != head.source_version:
            raise InvalidJob("the manifest changed; restore it, or discard")

    return check


def test_manifest_that_changes_before_the_last_chunk_is_an_error(memory: MemoryStore) -> None:
    listing = Listing(14)
    head = put_head(memory, make_head(source_version="v1"))
    chunks = extend_plan(memory, head, listing.refs, check_version_of(listing, head))
    next(chunks), next(chunks)
    listing.version = "v2"
    with pytest.raises(InvalidJob, match="the manifest changed"):
        next(chunks)
    assert key_of_chunk(2) not in memory.stored_keys()
    listing.version = "v1"
    assert list(extend_plan(memory, head, listing.refs, check_version_of(listing, head)))[-1].is_last


def test_resume_checks_the_manifest_before_it_writes(memory: MemoryStore) -> None:
    listing = Listing(30)
    head = put_head(memory, make_head(source_version="v1"))
    next(extend_plan(memory, head, listing.refs, check_version_of(listing, head)))
    listing.version = "v2"
    with pytest.raises(InvalidJob, match="the manifest changed"):
        list(extend_plan(memory, head, listing.refs, check_version_of(listing, head)))
    assert memory.stored_keys() == [key_of_chunk(0), HEAD_KEY]


def test_chunk_of_another_plan_is_refused(memory: MemoryStore) -> None:
    write_plan(memory, Listing(14))
    other = replace(make_head(), plan="feedfacefeedface")
    with pytest.raises(InvalidJob, match="belongs to plan"):
        list(read_chunks(memory, other))


def test_chunks_that_do_not_follow_each_other_are_refused(memory: MemoryStore) -> None:
    head, _ = write_plan(memory, Listing(14))
    memory.delete(key_of_chunk(1))
    third = memory.read(key_of_chunk(2)).data
    # The same listing closes the gap; a changed one cannot, because the chunk after it follows other images.
    with pytest.raises(InvalidJob, match=r"chunk-0000002\.arrow does not follow.*batchjob discard"):
        list(extend_plan(memory, head, Listing(14, version="v2").refs, do_nothing))
    memory.delete(key_of_chunk(1))
    assert len(list(extend_plan(memory, head, Listing(14).refs, do_nothing))) == 3
    memory.delete(key_of_chunk(1))
    memory.put_if_absent(key_of_chunk(1), third)
    with pytest.raises(InvalidJob, match=r"chunk-0000001\.arrow does not follow"):
        list(read_chunks(memory, head))


def test_shard_of_a_deleted_chunk_is_not_found(memory: MemoryStore) -> None:
    head, chunks = write_plan(memory, Listing(14))
    memory.delete(key_of_chunk(2))
    with pytest.raises(NotFound):
        PlanReader(memory, head).read_shard(chunks[2].shards[0])


# --- discarded plans -------------------------------------------------------------------------------------------------


def test_discarded_plan_is_followed_by_the_next_number(store: Store) -> None:
    first, _ = write_plan(store, Listing(14))
    assert not is_discarded(store, first)
    assert not is_plan_id_discarded(store, first.plan)
    discard_plan(store, first)
    discard_plan(store, first)  # a second time changes nothing
    assert is_discarded(store, first)
    assert is_plan_id_discarded(store, first.plan)
    assert read_current_head(store) == (1, None)
    second, chunks = write_plan(store, Listing(5))
    assert (second.number, second.folder, read_current_head(store)) == (1, "_batchjob/plans/0001/", (1, second))
    assert chunks[-1].end_cursor.rows == 5
    assert not is_plan_id_discarded(store, second.plan)
    assert not is_plan_id_discarded(store, "nobody's")
    assert is_plan_id_discarded(store, first.plan)
    assert store.read(key_of_chunk(2)).data  # the folder of the discarded plan is kept


@pytest.mark.parametrize("fault", [Fault.REPEATED, Fault.CONFLICT])
def test_already_exists_about_a_tombstone_is_verified(memory: MemoryStore, fault: Fault) -> None:
    head, _ = write_plan(memory, Listing(5))
    memory.inject("put_if_absent", TOMBSTONE_KEY, fault)
    discard_plan(memory, head)
    assert is_discarded(memory, head)


def test_failed_discard_is_reported(memory: MemoryStore) -> None:
    head, _ = write_plan(memory, Listing(5))
    memory.inject("put_if_absent", TOMBSTONE_KEY, Fault.DOWN)
    with pytest.raises(Unavailable):
        discard_plan(memory, head)
    assert read_current_head(memory) == (0, head)


# --- the contract ----------------------------------------------------------------------------------------------------

ROWS = pa.schema([pa.field("position", pa.int64()), pa.field("score", pa.float32())])


def test_first_contract_counts(store: Store) -> None:
    head = put_head(store, make_head())
    first = Contract(ROWS, "digest", (3, 224, 224))
    assert put_or_read(store, head, first) == first
    assert put_or_read(store, head, Contract(ROWS, "digest", (3, 32, 32))) == first  # the first image shape counts
    assert put_or_read(store, head, Contract(ROWS, "digest", None)) == first


def test_contract_without_an_image_shape_is_accepted(memory: MemoryStore) -> None:
    head = put_head(memory, make_head())
    for _ in range(2):
        assert put_or_read(memory, head, Contract(ROWS, "digest", None)) == Contract(ROWS, "digest", None)


def test_other_weights_or_schema_are_refused(store: Store) -> None:
    head = put_head(store, make_head())
    stored = put_or_read(store, head, Contract(ROWS, "a" * 64, None))
    with pytest.raises(InvalidJob, match=r"digest bbbbbbbbbbbb, .*begun with aaaaaaaaaaaa: weights or model code"):
        verify(stored, Contract(ROWS, "b" * 64, None), store.uri)
    wider = ROWS.append(pa.field("label", pa.string()))
    with pytest.raises(InvalidJob, match=r"another schema.*label"):
        verify(stored, Contract(wider, "a" * 64, None), store.uri)


@pytest.mark.parametrize("fault", [Fault.REPEATED, Fault.CONFLICT])
def test_already_exists_about_a_contract_is_read(memory: MemoryStore, fault: Fault) -> None:
    head = put_head(memory, make_head())
    memory.inject("put_if_absent", "*/schema.arrow", fault)
    contract = Contract(ROWS, "digest", (3, 8, 8))
    assert put_or_read(memory, head, contract) == contract
    assert put_or_read(memory, head, contract) == contract


def test_decisions_of_the_first_worker_count(memory: MemoryStore) -> None:
    head = put_head(memory, make_head())
    first, second = (Contract(ROWS, "digest", None, {"task.activation": value}) for value in ("softmax", "none"))
    assert put_or_read(memory, head, first) == first
    assert put_or_read(memory, head, second).decisions == {"task.activation": "softmax"}


def test_contract_of_an_earlier_version_has_no_decisions(memory: MemoryStore) -> None:
    head = put_head(memory, make_head())
    metadata = {b"batchjob.contract": json.dumps({"model": "digest", "size": [3, 8, 8]})}
    memory.put_if_absent(f"{head.folder}schema.arrow", ROWS.with_metadata(metadata).serialize().to_pybytes())
    decided = Contract(ROWS, "digest", None, {"task.activation": "none"})
    assert put_or_read(memory, head, decided) == Contract(ROWS, "digest", (3, 8, 8), {})


# --- the driver, planning only ---------------------------------------------------------------------------------------


def plan_job(tmp_path: Path, **model: object) -> str:
    """Plan a job over the images in `tmp_path`; return the plan's id."""
    job = batchjob.Job.model_validate(
        {
            "input": {"type": "prefix", "uri": str(tmp_path / "images")},
            "model": {"type": "torchvision", "name": "resnet18", "seed": 0, **model},
            "task": {"type": "classification", "labels": ["a", "b"]},
            "runtime": {"shard_size": 2},
            "output": {"uri": str(tmp_path / "out")},
        }
    )
    return make_plan(job, allow_empty=False, progress=NoProgress()).plan


def test_plan_of_another_job_shows_the_difference(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for n in range(5):
        (tmp_path / "images" / f"{n}.jpg").write_bytes(b"not looked into")
    first = plan_job(tmp_path)
    assert plan_job(tmp_path) == first
    with pytest.raises(InvalidJob, match=r"model\.name: resnet18 there, resnet34 here") as caught:
        plan_job(tmp_path, name="resnet34")
    assert caught.value.exit_code == 2
    assert "batchjob discard" in caught.value.message
