"""Plans: frozen once, chunk by chunk, whoever is killed where; adopted, compared, buried, never rewritten."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
from memory_store import Fault, Killed, MemoryStore
from seaweed import Seaweed

import batchjob
from batchjob.driver.driver import make_plan
from batchjob.driver.progress import NoProgress
from batchjob.errors import InvalidJob, NotFound, Unavailable
from batchjob.job.fingerprint import diff_fingerprints
from batchjob.plan import contract
from batchjob.plan.chunks import Chunk, extend_plan
from batchjob.plan.chunks import read_chunks as chunks_of_chunks
from batchjob.plan.contract import Contract
from batchjob.plan.head import (
    FORMAT_VERSION,
    PlanHead,
    discard_plan,
    is_discarded,
    is_plan_id_discarded,
    put_head,
    read_current_head,
)
from batchjob.plan.head import new_head as new_head_of_head
from batchjob.plan.reader import PlanReader
from batchjob.sources.source import REF_FIELDS
from batchjob.storage.store import Store, open_store
from batchjob.types import Cursor

SHARD, CHUNK = 3, 6
SCHEMA = pa.schema([*REF_FIELDS, pa.field("sku", pa.string())])


@dataclass
class Listing:
    """A source of so many images, in batches of `batch` rows, that may change."""

    rows: int
    batch: int = 4
    version: str = "v1"
    asked: list[Cursor] = field(default_factory=list)

    def refs(self, after: Cursor) -> Iterator[pa.RecordBatch]:
        self.asked.append(after)
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


def unchanged() -> None:
    """The source is as it was."""


def new_head(number: int = 0, shard_size: int = SHARD, **facts: object) -> PlanHead:
    defaults = {"job": {"name": "tags"}, "fingerprint": {"model": {"name": "resnet18"}}}
    return new_head_of_head(
        number, shard_size=shard_size, **{**defaults, "source_version": None, "batchjob": "0.1.0", **facts}
    )


def written(store: Store, listing: Listing, head: PlanHead | None = None) -> tuple[PlanHead, list[Chunk]]:
    """A plan as a driver makes it: the head in force or a new one, then every chunk."""
    number, there = read_current_head(store)
    head = there or put_head(store, head or new_head(number))
    return head, list(extend_plan(store, head, listing.refs, unchanged))


def chunk_key(number: int) -> str:
    return f"_batchjob/plans/0000/chunk-{number:07d}.arrow"


HEAD, TOMB = "_batchjob/plans/0000/head.json", "_batchjob/plans/0000/discarded"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two shards in place of 65,536 rows."""
    monkeypatch.setattr(
        "batchjob.plan.chunks.CHUNK_ROWS", CHUNK + 1
    )  # the odd row does not count: chunks hold whole shards


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


# --- what a plan holds ----------------------------------------------------------------------------------------------


def test_every_image_is_planned_once_and_in_order(store: Store) -> None:
    head, chunks = written(store, Listing(14))
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
    assert list(chunks_of_chunks(store, head)) == chunks
    assert read_current_head(store) == (0, head)


@pytest.mark.parametrize(
    ("rows", "chunk_rows"),
    [(1, [1]), (5, [5]), (6, [6]), (7, [6, 1]), (12, [6, 6]), (13, [6, 6, 1])],
)
@pytest.mark.parametrize("batch", [1, 4, 6, 50])
def test_chunks_hold_whole_shards_and_only_the_last_one_says_so(
    memory: MemoryStore, rows: int, chunk_rows: list[int], batch: int
) -> None:
    _, chunks = written(memory, Listing(rows, batch))
    ends = [chunk.end_cursor.rows for chunk in chunks]
    assert [end - chunk.first_row for end, chunk in zip(ends, chunks, strict=True)] == chunk_rows
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunk_rows) - 1) + [True]
    assert [chunk.number for chunk in chunks] == list(range(len(chunk_rows)))
    assert [chunk.end_cursor.last for chunk in chunks] == [f"s3://lake/v1/{end - 1:04d}.jpg" for end in ends]


def test_a_shard_larger_than_a_chunk_is_a_chunk(memory: MemoryStore) -> None:
    _, chunks = written(memory, Listing(25), new_head(shard_size=10))
    assert [[key.rows for key in chunk.shards] for chunk in chunks] == [[10], [10], [5]]


def test_an_empty_plan_has_one_shard_of_no_rows(store: Store) -> None:
    head, chunks = written(store, Listing(0))
    assert [(chunk.is_last, [key.rows for key in chunk.shards]) for chunk in chunks] == [(True, [0])]
    shard = PlanReader(store, head).read_shard(chunks[0].shards[0])
    assert (shard.refs, shard.passthrough.schema.names) == ((), ["sku"])


def test_a_chunk_of_thousands_of_shards_is_read_back(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 5000)
    head, chunks = written(memory, Listing(6000, batch=1000), new_head(shard_size=1))
    assert [len(chunk.shards) for chunk in chunks] == [5000, 1000]
    assert PlanReader(memory, head).read_shard(chunks[1].shards[-1]).refs[0].position == 5999
    assert list(chunks_of_chunks(memory, head)) == chunks


def test_the_first_images_are_those_of_the_plan_not_of_its_first_shard(memory: MemoryStore) -> None:
    head, _ = written(memory, Listing(14))
    reader = PlanReader(memory, head)
    assert [ref.position for ref in reader.read_first_refs(5)] == [0, 1, 2, 3, 4]
    assert reader.read_first_refs(2) == reader.read_first_refs(5)[:2]


def test_each_chunk_holds_the_digest_of_the_one_before(store: Store) -> None:
    head, chunks = written(store, Listing(14))
    digests = [hashlib.sha256(store.read(chunk_key(n)).data).hexdigest() for n in range(3)]
    assert [chunk.previous_digest for chunk in chunks] == ["", *digests[:2]]
    assert [chunk.previous_digest for chunk in chunks_of_chunks(store, head)] == ["", *digests[:2]]


def test_shard_ids_hang_on_plan_index_and_members(memory: MemoryStore) -> None:
    def ids(head: PlanHead, listing: Listing) -> list[str]:
        _, chunks = written(MemoryStore(), listing, head)
        return [key.id for chunk in chunks for key in chunk.shards]

    head = new_head()
    first = ids(head, Listing(14))
    assert len(set(first)) == 5
    assert first == ids(head, Listing(14, batch=1))  # not on how the source cuts its batches
    assert not set(first) & set(ids(new_head(), Listing(14)))  # another plan of the same job
    assert not set(first) & set(ids(head, Listing(14, version="v2")))  # other members
    assert first[:4] == ids(head, Listing(15))[:4]


def test_shards_of_the_same_images_have_ids_of_their_own(memory: MemoryStore) -> None:
    """A manifest may name an image many times."""
    one = next(Listing(1).refs(Cursor()))
    head = put_head(memory, new_head())
    chunks = extend_plan(memory, head, lambda after: iter([one] * 12), unchanged)
    assert len({key.id for chunk in chunks for key in chunk.shards}) == 4


def test_a_source_without_even_a_schema_is_said(memory: MemoryStore) -> None:
    head = put_head(memory, new_head())
    with pytest.raises(InvalidJob, match="no batch"):
        list(extend_plan(memory, head, lambda after: iter(()), unchanged))


# --- the head -------------------------------------------------------------------------------------------------------


def test_a_head_says_what_the_plan_is(store: Store) -> None:
    head = new_head(fingerprint={"model": {"name": "resnet18"}, "task": {"top_k": 5}}, source_version="digest")
    assert read_current_head(store) == (0, None)
    assert put_head(store, head) == head
    assert read_current_head(store) == (0, head)
    assert len({new_head().plan for _ in range(50)}) == 50
    assert json.loads(store.read(HEAD).data)["format"] == FORMAT_VERSION


def test_a_second_driver_adopts_the_head_that_stands(store: Store) -> None:
    first = put_head(store, new_head())
    assert put_head(store, new_head()) == first


def test_no_plan_is_frozen_over_what_lies_there(store: Store) -> None:
    store.put_if_absent("predictions/part-0000000-old.parquet", b"rows")
    with pytest.raises(
        InvalidJob, match=r"part-0000000-old\.parquet is there but no plan is.*choose another"
    ) as caught:
        put_head(store, new_head())
    assert caught.value.exit_code == 2
    assert read_current_head(store) == (0, None)


def test_what_a_discarded_plan_left_meanwhile_is_cleared_away_and_the_plan_stands(store: Store) -> None:
    late = "predictions/part-0000000-late.parquet"
    store.put_if_absent(late, b"rows")
    cleared = list[str]()

    def clear(names: list[str]) -> None:
        cleared.extend(names)
        store.delete(late)

    head = new_head()
    assert put_head(store, head, clear) == head
    assert cleared == [late]
    assert list(store.list("predictions/")) == []


def test_a_driver_overtaken_while_it_froze_adopts_and_does_not_complain(memory: MemoryStore) -> None:
    rival = new_head()

    def overtake() -> None:
        put_head(memory.client(), rival)
        memory.client().put_if_absent("predictions/part-0000000-theirs.parquet", b"rows")

    memory.inject("list", "predictions/", overtake)
    assert put_head(memory, new_head()) == rival


@pytest.mark.parametrize("fault", [Fault.REPEATED, Fault.CONFLICT])
def test_exists_is_not_believed_of_a_head(memory: MemoryStore, fault: Fault) -> None:
    memory.inject("put_if_absent", HEAD, fault)
    head = new_head()
    assert put_head(memory, head) == head
    assert read_current_head(memory) == (0, head)


def test_a_store_that_always_says_exists_is_temporary(memory: MemoryStore) -> None:
    memory.inject("put_if_absent", HEAD, Fault.CONFLICT, times=100)
    with pytest.raises(Unavailable, match=r"head\.json.*run again") as caught:
        put_head(memory, new_head())
    assert caught.value.exit_code == 75
    assert len(memory.written_keys()) < 10


def test_an_unknown_format_names_the_version_that_can_finish_it(store: Store) -> None:
    head = new_head(batchjob="7.1.0")
    store.put_if_absent(HEAD, json.dumps({**vars(head), "format": 99, "colour": "blue"}).encode())
    with pytest.raises(
        InvalidJob, match=rf"format 99, this version knows {FORMAT_VERSION}.*batchjob 7\.1\.0"
    ) as caught:
        read_current_head(store)
    assert caught.value.exit_code == 2
    with pytest.raises(InvalidJob, match=r"batchjob 7\.1\.0"):
        put_head(store, new_head())
    # Discarded by the version that knows it, it is in nobody's way.
    store.put_if_absent(TOMB, b"{}")
    assert read_current_head(store) == (1, None)
    assert is_plan_id_discarded(store, head.plan)


def test_the_fingerprint_comes_back_and_tells_the_difference(store: Store) -> None:
    there = {"model": {"name": "resnet18", "weights": "V1"}, "preprocess": {"resize": None, "mean": [0.5, 0.5, 0.5]}}
    put_head(store, new_head(fingerprint=there))
    _, head = read_current_head(store)
    assert head is not None
    assert diff_fingerprints(head.fingerprint, there) == []
    other = {**there, "model": {"name": "resnet18", "weights": "V2"}}
    assert diff_fingerprints(head.fingerprint, other) == ["model.weights: V1 there, V2 here"]


# --- adopted, resumed, torn -----------------------------------------------------------------------------------------


def test_a_finished_plan_is_adopted_without_a_look_at_its_source(store: Store) -> None:
    _, chunks = written(store, Listing(14))
    listing = Listing(99)

    def never() -> None:
        raise AssertionError("the source was asked for")

    _, head = read_current_head(store)
    assert head is not None
    assert list(extend_plan(store, head, listing.refs, never)) == chunks
    assert listing.asked == []


@pytest.mark.parametrize("fault", [Fault.KILLED_BEFORE, Fault.KILLED_AFTER])
@pytest.mark.parametrize("puts", [0, 1, 2, 3])
def test_killed_at_any_put_the_next_driver_ends_with_the_same_plan(puts: int, fault: Fault) -> None:
    head = new_head()
    _, whole = written(MemoryStore(), Listing(14), head)
    memory = MemoryStore()
    memory.inject("put_if_absent", "*", fault, skip=puts)
    with pytest.raises(Killed):
        written(memory, Listing(14), head)
    left = memory.stored_keys()
    listing, again = Listing(14, batch=5), memory.client()
    assert written(again, listing, head) == (head, whole)
    assert sorted([*left, *again.written_keys()]) == sorted(
        [HEAD, *(chunk_key(n) for n in range(3))]
    )  # each written once
    complete = fault is Fault.KILLED_AFTER and puts == 3
    assert [after.rows for after in listing.asked] == ([] if complete else [CHUNK * max(0, len(left) - 1)])


def test_a_chunk_is_given_out_only_once_it_stands(memory: MemoryStore) -> None:
    head = put_head(memory, new_head())
    for chunk in extend_plan(memory, head, Listing(14).refs, unchanged):
        assert chunk_key(chunk.number) in memory.stored_keys()


@pytest.mark.parametrize("fault", [Fault.REPEATED, Fault.CONFLICT])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_exists_is_not_believed_of_a_chunk(memory: MemoryStore, number: int, fault: Fault) -> None:
    memory.inject("put_if_absent", chunk_key(number), fault)
    head, listing = new_head(), Listing(14)
    _, chunks = written(memory, listing, head)
    assert chunks == written(MemoryStore(), Listing(14), head)[1]
    assert len(listing.asked) == 1  # our own chunk, met again, does not start the listing over


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.DOWN])
def test_a_lost_answer_ends_the_driver_as_temporary_and_the_next_one_goes_on(memory: MemoryStore, fault: Fault) -> None:
    memory.inject("put_if_absent", chunk_key(1), fault)
    head = new_head()
    with pytest.raises(Unavailable):
        written(memory, Listing(14), head)
    assert written(memory, Listing(14)) == (head, written(MemoryStore(), Listing(14), head)[1])


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_a_driver_overtaken_midway_adopts_what_the_other_wrote(memory: MemoryStore, ahead: int) -> None:
    """The rival sees one image more, so its chunks cannot be taken for ours."""
    head = put_head(memory, new_head())
    theirs: list[Chunk] = []

    def overtake() -> None:
        rival = extend_plan(memory.client(), head, Listing(15, version="v2").refs, unchanged)
        theirs.extend(islice(rival, ahead))

    memory.inject("put_if_absent", chunk_key(0), overtake)
    mine = list(extend_plan(memory, head, Listing(14).refs, unchanged))
    assert mine[:ahead] == theirs
    assert mine == list(chunks_of_chunks(memory, head))
    assert [chunk.is_last for chunk in mine] == [False, False, True]
    rows = [key.rows for chunk in mine for key in chunk.shards]
    assert sum(rows) == (15 if ahead == 3 else 14)


def test_two_drivers_in_step_make_one_plan(memory: MemoryStore) -> None:
    head = put_head(memory, new_head())
    one = extend_plan(memory, head, Listing(30, batch=7).refs, unchanged)
    two = extend_plan(memory.client(), head, Listing(30, batch=2).refs, unchanged)
    assert list(zip(one, two, strict=True)) == [(chunk, chunk) for chunk in chunks_of_chunks(memory, head)]


def test_a_source_that_shrank_behind_the_cursor_ends_the_plan_there(memory: MemoryStore) -> None:
    memory.inject("put_if_absent", chunk_key(1), Fault.KILLED_BEFORE)
    head = new_head()
    with pytest.raises(Killed):
        written(memory, Listing(14), head)
    _, chunks = written(memory, Listing(CHUNK))
    assert [(len(chunk.shards), chunk.end_cursor.rows, chunk.is_last) for chunk in chunks] == [
        (2, 6, False),
        (0, 6, True),
    ]
    assert chunks[-1].end_cursor == chunks[0].end_cursor


def changing(listing: Listing, head: PlanHead) -> Callable[[], None]:
    """What the driver hands in: raises once the source's version is another."""

    def check() -> None:
        if listing.version != head.source_version:
            raise InvalidJob("the manifest changed; restore it, or discard")

    return check


def test_a_manifest_that_changed_before_the_last_chunk_ends_the_plan(memory: MemoryStore) -> None:
    listing = Listing(14)
    head = put_head(memory, new_head(source_version="v1"))
    chunks = extend_plan(memory, head, listing.refs, changing(listing, head))
    next(chunks), next(chunks)
    listing.version = "v2"
    with pytest.raises(InvalidJob, match="the manifest changed"):
        next(chunks)
    assert chunk_key(2) not in memory.stored_keys()
    listing.version = "v1"
    assert list(extend_plan(memory, head, listing.refs, changing(listing, head)))[-1].is_last


def test_a_resume_finds_a_changed_manifest_before_it_writes_anything(memory: MemoryStore) -> None:
    listing = Listing(30)
    head = put_head(memory, new_head(source_version="v1"))
    next(extend_plan(memory, head, listing.refs, changing(listing, head)))
    listing.version = "v2"
    with pytest.raises(InvalidJob, match="the manifest changed"):
        list(extend_plan(memory, head, listing.refs, changing(listing, head)))
    assert memory.stored_keys() == [chunk_key(0), HEAD]


def test_a_chunk_of_another_plan_is_refused(memory: MemoryStore) -> None:
    written(memory, Listing(14))
    other = replace(new_head(), plan="feedfacefeedface")
    with pytest.raises(InvalidJob, match="belongs to plan"):
        list(chunks_of_chunks(memory, other))


def test_chunks_that_do_not_follow_each_other_are_refused(memory: MemoryStore) -> None:
    head, _ = written(memory, Listing(14))
    memory.delete(chunk_key(1))
    third = memory.read(chunk_key(2)).data
    # The same listing closes the gap; a changed one cannot, for the chunk behind it was cut after other images.
    with pytest.raises(InvalidJob, match=r"chunk-0000002\.arrow does not follow.*batchjob discard"):
        list(extend_plan(memory, head, Listing(14, version="v2").refs, unchanged))
    memory.delete(chunk_key(1))
    assert len(list(extend_plan(memory, head, Listing(14).refs, unchanged))) == 3
    memory.delete(chunk_key(1))
    memory.put_if_absent(chunk_key(1), third)
    with pytest.raises(InvalidJob, match=r"chunk-0000001\.arrow does not follow"):
        list(chunks_of_chunks(memory, head))


def test_a_shard_whose_chunk_is_gone_is_not_found(memory: MemoryStore) -> None:
    head, chunks = written(memory, Listing(14))
    memory.delete(chunk_key(2))
    with pytest.raises(NotFound):
        PlanReader(memory, head).read_shard(chunks[2].shards[0])


# --- discarded ------------------------------------------------------------------------------------------------------


def test_a_discarded_plan_gives_way_to_the_next_number(store: Store) -> None:
    first, _ = written(store, Listing(14))
    assert not is_discarded(store, first)
    assert not is_plan_id_discarded(store, first.plan)
    discard_plan(store, first)
    discard_plan(store, first)  # twice does no harm
    assert is_discarded(store, first)
    assert is_plan_id_discarded(store, first.plan)
    assert read_current_head(store) == (1, None)
    second, chunks = written(store, Listing(5))
    assert (second.number, second.folder, read_current_head(store)) == (1, "_batchjob/plans/0001/", (1, second))
    assert chunks[-1].end_cursor.rows == 5
    assert not is_plan_id_discarded(store, second.plan)
    assert not is_plan_id_discarded(store, "nobody's")
    assert is_plan_id_discarded(store, first.plan)
    assert store.read(chunk_key(2)).data  # the folder of the buried one stays


@pytest.mark.parametrize("fault", [Fault.REPEATED, Fault.CONFLICT])
def test_exists_is_not_believed_of_a_tombstone(memory: MemoryStore, fault: Fault) -> None:
    head, _ = written(memory, Listing(5))
    memory.inject("put_if_absent", TOMB, fault)
    discard_plan(memory, head)
    assert is_discarded(memory, head)


def test_a_tombstone_that_cannot_be_put_is_said(memory: MemoryStore) -> None:
    head, _ = written(memory, Listing(5))
    memory.inject("put_if_absent", TOMB, Fault.DOWN)
    with pytest.raises(Unavailable):
        discard_plan(memory, head)
    assert read_current_head(memory) == (0, head)


# --- what all workers agree on --------------------------------------------------------------------------------------

ROWS = pa.schema([pa.field("position", pa.int64()), pa.field("score", pa.float32())])


def test_workers_agree_on_what_the_first_one_put(store: Store) -> None:
    head = put_head(store, new_head())
    first = Contract(ROWS, "digest", (3, 224, 224))
    assert contract.put_or_verify(store, head, first) == first
    assert (
        contract.put_or_verify(store, head, Contract(ROWS, "digest", (3, 32, 32))) == first
    )  # the size that counts is the first
    assert contract.put_or_verify(store, head, Contract(ROWS, "digest", None)) == first


def test_images_without_a_common_size_agree_too(memory: MemoryStore) -> None:
    head = put_head(memory, new_head())
    for _ in range(2):
        assert contract.put_or_verify(memory, head, Contract(ROWS, "digest", None)) == Contract(ROWS, "digest", None)


def test_other_weights_or_another_schema_end_the_worker(store: Store) -> None:
    head = put_head(store, new_head())
    contract.put_or_verify(store, head, Contract(ROWS, "a" * 64, None))
    with pytest.raises(InvalidJob, match=r"digest bbbbbbbbbbbb, .*begun with aaaaaaaaaaaa: weights or model code"):
        contract.put_or_verify(store, head, Contract(ROWS, "b" * 64, None))
    wider = ROWS.append(pa.field("label", pa.string()))
    with pytest.raises(InvalidJob, match=r"another schema.*label"):
        contract.put_or_verify(store, head, Contract(wider, "a" * 64, None))


@pytest.mark.parametrize("fault", [Fault.REPEATED, Fault.CONFLICT])
def test_exists_is_not_believed_of_what_was_agreed(memory: MemoryStore, fault: Fault) -> None:
    head = put_head(memory, new_head())
    memory.inject("put_if_absent", "*/schema.arrow", fault)
    ours = Contract(ROWS, "digest", (3, 8, 8))
    assert contract.put_or_verify(memory, head, ours) == ours
    assert contract.put_or_verify(memory, head, ours) == ours


# --- the whole driver, planning only --------------------------------------------------------------------------------


def planned(tmp_path: Path, **model: object) -> str:
    """Plan a job over the images in `tmp_path`; the plan's id."""
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


def test_another_job_is_told_what_differs_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for n in range(5):
        (tmp_path / "images" / f"{n}.jpg").write_bytes(b"not looked into")
    first = planned(tmp_path)
    assert planned(tmp_path) == first
    with pytest.raises(InvalidJob, match=r"model\.name: resnet18 there, resnet34 here") as caught:
        planned(tmp_path, name="resnet34")
    assert caught.value.exit_code == 2
    assert "batchjob discard" in caught.value.message
