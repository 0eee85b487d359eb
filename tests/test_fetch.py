"""One object that cannot be read is a row; a store that cannot be read is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fault_proxy import RESET, TRUNCATE, FaultProxy, Reply, run_fault_proxy
from seaweed import Seaweed

from batchjob.errors import AccessDenied, Unavailable
from batchjob.loader.fetch import Fetcher, group_refs
from batchjob.storage.objects import ObjectData
from batchjob.storage.options import StorageOptions
from batchjob.storage.reader import Reader
from batchjob.types import ErrorRecord, ImageRef

DENIED = Reply(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
BROKEN = Reply(500, b"<Error><Code>InternalError</Code><Message>We encountered an error</Message></Error>")


@pytest.fixture
def faulty(s3: Seaweed) -> Iterator[FaultProxy]:
    with run_fault_proxy(s3.endpoint) as running:
        yield running


@pytest.fixture
def fetcher(faulty: FaultProxy) -> Fetcher:
    return Fetcher(Reader({"s3://": StorageOptions(endpoint=faulty.endpoint)}, retry_timeout=0.3))


def photos(s3: Seaweed, *names: str) -> list[ImageRef]:
    bucket = s3.bucket()
    for name in names:
        s3.put(bucket + name, name.encode())
    return [ImageRef(position, bucket + name, bucket + name) for position, name in enumerate(names)]


def told(found: list[ObjectData | ErrorRecord]) -> list[str]:
    return [answer.type if isinstance(answer, ErrorRecord) else answer.data.decode() for answer in found]


def deny(faulty: FaultProxy, reply: Reply, *names: str) -> None:
    faulty.decide = lambda method, path: reply if method == "GET" and path.endswith(names) else None


@pytest.mark.parametrize("reply", [DENIED, BROKEN], ids=["denied", "broken"])
def test_an_object_that_is_always_refused_is_that_images_fault(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher, reply: Reply
) -> None:
    refs = photos(s3, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    deny(faulty, reply, "b.jpg", "d.jpg")
    found = fetcher.fetch(refs)
    assert told(found) == ["a.jpg", "unreadable", "c.jpg", "unreadable"]
    fault = found[1]
    assert isinstance(fault, ErrorRecord)
    assert fault.stage == "fetch"
    assert "b.jpg" in fault.message
    assert "other objects of the same store can be read" in fault.message
    assert "credentials" not in fault.message


def test_a_store_that_refuses_everything_is_no_images_fault(s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher) -> None:
    refs = photos(s3, "a.jpg", "b.jpg", "c.jpg")
    assert told(fetcher.fetch(refs[:2])) == ["a.jpg", "b.jpg"]
    deny(faulty, DENIED, ".jpg")
    with pytest.raises(Unavailable, match="access denied"):
        fetcher.fetch(refs)


def test_where_nothing_has_been_read_yet_nobody_can_tell(s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher) -> None:
    refs = photos(s3, "a.jpg", "b.jpg")
    deny(faulty, DENIED, "a.jpg")
    with pytest.raises(Unavailable):
        fetcher.fetch(refs[:1])
    assert told(fetcher.fetch(refs[1:])) == ["b.jpg"]
    assert told(fetcher.fetch(refs[:1])) == ["unreadable"]


def test_credentials_that_expire_between_two_looks_leave_no_row(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher
) -> None:
    refs = photos(s3, "a.jpg", "b.jpg")
    fetcher.fetch(refs[:1])
    canary_reads = 0

    def decide(method: str, path: str) -> Reply | None:
        nonlocal canary_reads
        if path.endswith("a.jpg"):
            canary_reads += 1
        return DENIED if path.endswith("b.jpg") or canary_reads > 1 else None

    faulty.decide = decide
    with pytest.raises(Unavailable):
        fetcher.fetch(refs[1:])
    assert canary_reads == 2


def test_another_stores_canary_says_nothing(s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher, tmp_path: Path) -> None:
    local = tmp_path / "here.jpg"
    local.write_bytes(b"here")
    fetcher.fetch([ImageRef(0, str(local), str(local))])
    refs = photos(s3, "a.jpg")
    deny(faulty, DENIED, "a.jpg")
    with pytest.raises(Unavailable):
        fetcher.fetch(refs)


def test_a_fault_that_has_passed_by_the_second_try_is_no_fault(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher
) -> None:
    refs = photos(s3, "a.jpg", "b.jpg")
    fetcher.fetch(refs[:1])
    denials = [DENIED]
    faulty.decide = lambda method, path: denials.pop() if path.endswith("b.jpg") and denials else None
    assert told(fetcher.fetch(refs[1:])) == ["b.jpg"]


def in_order(*actions: Reply | str | None) -> Callable[[str, str], Reply | str | None]:
    left = list(actions)
    return lambda method, path: left.pop(0) if left else None


@pytest.fixture
def patient(faulty: FaultProxy) -> Fetcher:
    """Asks once within its window, and waits out an outage."""
    return Fetcher(
        Reader({"s3://": StorageOptions(endpoint=faulty.endpoint)}, retry_timeout=0.05, outage_timeout=30), retries=2
    )


def test_a_store_that_falls_silent_is_waited_for(s3: Seaweed, faulty: FaultProxy, patient: Fetcher) -> None:
    refs = photos(s3, "a.jpg", "b.jpg", "c.jpg")
    faulty.decide = in_order(*[RESET] * 12)
    assert told(patient.fetch(refs)) == ["a.jpg", "b.jpg", "c.jpg"], "before anything could be read"
    faulty.decide = in_order(*[RESET] * 12)
    assert told(patient.fetch(refs)) == ["a.jpg", "b.jpg", "c.jpg"], "in between"
    assert not patient.reader.outage(refs[0].location).is_ongoing


def test_a_silence_that_lasts_is_raised_and_costs_the_next_batch_no_second_one(
    s3: Seaweed, faulty: FaultProxy, patient: Fetcher
) -> None:
    refs = photos(s3, "a.jpg", "b.jpg")
    patient.fetch(refs)
    brief = replace(
        patient, reader=Reader({"s3://": StorageOptions(endpoint=faulty.endpoint)}, 0.05, outage_timeout=1.0)
    )
    faulty.decide = lambda method, path: RESET
    for _ in range(2):
        with pytest.raises(Unavailable, match="does not answer"):
            brief.fetch(refs)
        faulty.requests.clear()
    faulty.decide = lambda method, path: None
    assert told(brief.fetch(refs)) == ["a.jpg", "b.jpg"]


def test_an_object_that_is_refused_is_asked_for_as_often_as_the_job_says(
    s3: Seaweed, faulty: FaultProxy, patient: Fetcher
) -> None:
    refs = photos(s3, "a.jpg", "b.jpg")
    patient.fetch(refs[:1])
    deny(faulty, DENIED, "b.jpg")
    for retries in (0, 1, 5):
        faulty.requests.clear()
        assert told(replace(patient, retries=retries).fetch(refs[1:])) == ["unreadable"]
        assert sum(path.endswith("b.jpg") for _, path in faulty.requests) == 1 + retries


def test_refused_credentials_are_not_waited_for(s3: Seaweed, faulty: FaultProxy, patient: Fetcher) -> None:
    refs = photos(s3, "a.jpg", "b.jpg")
    patient.fetch(refs)
    deny(faulty, DENIED, ".jpg")
    faulty.requests.clear()
    with pytest.raises(AccessDenied):
        patient.fetch(refs)
    assert len(faulty.requests) == 2, "each image once; of the canary more would not be known"


def test_a_canary_that_is_gone_still_shows_that_the_store_answers(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher
) -> None:
    refs = photos(s3, "a.jpg", "b.jpg")
    fetcher.fetch(refs[:1])
    s3.delete(refs[0].location)
    deny(faulty, DENIED, "b.jpg")
    assert told(fetcher.fetch(refs[1:])) == ["unreadable"]


def test_local_files_that_cannot_be_read_are_not_waited_for(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(Unavailable, match="cannot be read"):
        Fetcher(Reader(outage_timeout=300)).fetch([ImageRef(0, "loop", str(loop))])


def test_an_object_that_was_deleted_after_the_plan_is_a_fault_that_says_so(
    s3: Seaweed, fetcher: Fetcher, tmp_path: Path
) -> None:
    (ref,) = photos(s3, "a.jpg")
    local = tmp_path / "b.jpg"
    local.write_bytes(b"b")
    planned = [ref, ImageRef(1, "b", str(local))]
    planned = [replace(one, etag=fetcher.reader.stat(one.location).etag) for one in planned]
    s3.delete(ref.location)
    local.unlink()
    for fault in fetcher.fetch(planned):
        assert isinstance(fault, ErrorRecord)
        assert (fault.stage, fault.type) == ("fetch", "deleted")
        assert "deleted since the plan was made" in fault.message
    assert told(fetcher.fetch([replace(one, etag=None) for one in planned])) == ["not_found"] * 2, "no tag was planned"


def test_a_run_of_large_images_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.loader.fetch.MAX_FETCH_BYTES", 10)
    refs = [ImageRef(n, str(n), str(n), size=size) for n, size in enumerate([4, 6, 1, 30, None, 10])]
    assert [[ref.position for ref in run] for run in group_refs(refs)] == [[0, 1], [2], [3], [4, 5]]


def test_an_object_that_was_overwritten_after_the_plan_is_a_fault_that_says_so(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher, tmp_path: Path
) -> None:
    refs = photos(s3, "a.jpg", "b.jpg")
    tags = [fetcher.reader.stat(ref.location).etag for ref in refs]
    planned = [replace(ref, etag=etag) for ref, etag in zip(refs, tags, strict=True)]
    assert told(fetcher.fetch(planned)) == ["a.jpg", "b.jpg"]
    s3.put(refs[1].location, b"another")
    assert told(fetcher.fetch(planned)) == ["a.jpg", "changed"]
    assert told(fetcher.fetch(refs)) == ["a.jpg", "another"], "no tag was planned"
    local = tmp_path / "c.jpg"
    local.write_bytes(b"c")
    ref = ImageRef(0, "c", str(local), etag=fetcher.reader.stat(str(local)).etag)
    assert told(fetcher.fetch([ref])) == ["c"]
    local.write_bytes(b"other")
    (fault,) = fetcher.fetch([ref])
    assert isinstance(fault, ErrorRecord)
    assert (fault.stage, fault.type) == ("fetch", "changed")
    assert "changed since the plan was made" in fault.message


def test_an_object_that_is_too_large_or_another_is_not_read(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher, tmp_path: Path
) -> None:
    bucket, local = s3.bucket(), tmp_path / "large.jpg"
    local.write_bytes(b"x" * 100_000)
    clouds = [f"{bucket}large.jpg", f"{bucket}not\xa0printable.jpg"]  # the second is read by way of boto3
    for uri in clouds:
        s3.put(uri, local.read_bytes())
    tags = [fetcher.reader.stat(uri).etag for uri in clouds]
    faulty.decide = lambda method, path: TRUNCATE if method == "GET" else None  # who reads it all fails
    for uri in (*clouds, str(local)):
        (fault,) = replace(fetcher, max_bytes=1000).fetch([ImageRef(0, uri, uri)])
        assert fault == ErrorRecord("fetch", "too_large", "the file has 100,000 bytes, over decode.max_bytes 1,000")
    for uri, etag in zip(clouds, tags, strict=True):
        (fault,) = fetcher.fetch([ImageRef(0, uri, uri, etag="planned")])
        assert fault == ErrorRecord("fetch", "changed", f"{uri}: changed since the plan was made (planned, now {etag})")
    assert len([1 for method, _ in faulty.requests if method == "GET"]) == 4, "each once"


def test_a_file_of_any_protocol_that_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/limits/fine": b"x" * 1000, "/limits/large": b"x" * 1001})
    read: list[str] = []
    cat = type(memory).cat_file

    def watched(self: object, path: str, **more: object) -> bytes:
        read.append(path)
        return bytes(cat(self, path, **more))

    monkeypatch.setattr(type(memory), "cat_file", watched)
    uris = ["memory://limits/fine", "memory://limits/large"]
    found = Fetcher(Reader(retry_timeout=0.0), max_bytes=1000).fetch(
        [ImageRef(n, uri, uri) for n, uri in enumerate(uris)]
    )
    assert isinstance(found[0], ObjectData)
    assert found[1] == ErrorRecord("fetch", "too_large", "the file has 1,001 bytes, over decode.max_bytes 1,000")
    assert read == ["/limits/fine"]
