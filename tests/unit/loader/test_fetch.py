"""Fetcher: an object that cannot be read is an error row; a store that cannot be read is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from batchjob.errors import AccessDenied, Unavailable
from batchjob.loader.fetch import Fetcher, group_refs
from batchjob.storage.objects import ObjectData
from batchjob.storage.options import StorageOptions
from batchjob.storage.reader import Reader
from batchjob.types import ErrorRecord, ImageRef
from tests.support.fault_proxy import RESET, TRUNCATE, FaultProxy, Reply, run_fault_proxy
from tests.support.seaweed import Seaweed

DENIED = Reply(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
BROKEN = Reply(500, b"<Error><Code>InternalError</Code><Message>We encountered an error</Message></Error>")


@pytest.fixture
def faulty(s3: Seaweed) -> Iterator[FaultProxy]:
    with run_fault_proxy(s3.endpoint) as running:
        yield running


@pytest.fixture
def fetcher(faulty: FaultProxy) -> Fetcher:
    return Fetcher(Reader({"s3://": StorageOptions(endpoint=faulty.endpoint)}, retry_timeout=0.3))


def put_images(s3: Seaweed, *names: str) -> list[ImageRef]:
    bucket = s3.bucket()
    for name in names:
        s3.put(bucket + name, name.encode())
    return [ImageRef(position, bucket + name, bucket + name) for position, name in enumerate(names)]


def read_or_error_types(answers: list[ObjectData | ErrorRecord]) -> list[str]:
    return [answer.type if isinstance(answer, ErrorRecord) else answer.data.decode() for answer in answers]


def deny(faulty: FaultProxy, reply: Reply, *names: str) -> None:
    faulty.decide = lambda method, path: reply if method == "GET" and path.endswith(names) else None


@pytest.mark.parametrize("reply", [DENIED, BROKEN], ids=["denied", "broken"])
def test_object_that_is_always_refused_is_an_error_of_its_image(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher, reply: Reply
) -> None:
    refs = put_images(s3, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    deny(faulty, reply, "b.jpg", "d.jpg")
    answers = fetcher.fetch(refs)
    assert read_or_error_types(answers) == ["a.jpg", "unreadable", "c.jpg", "unreadable"]
    error = answers[1]
    assert isinstance(error, ErrorRecord)
    assert error.stage == "fetch"
    assert "b.jpg" in error.message
    assert "other objects of the same store can be read" in error.message
    assert "credentials" not in error.message


def test_store_that_refuses_everything_is_unavailable(s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher) -> None:
    refs = put_images(s3, "a.jpg", "b.jpg", "c.jpg")
    assert read_or_error_types(fetcher.fetch(refs[:2])) == ["a.jpg", "b.jpg"]
    deny(faulty, DENIED, ".jpg")
    with pytest.raises(Unavailable, match="access denied"):
        fetcher.fetch(refs)


def test_refused_object_is_unavailable_until_a_canary_was_read(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher
) -> None:
    refs = put_images(s3, "a.jpg", "b.jpg")
    deny(faulty, DENIED, "a.jpg")
    with pytest.raises(Unavailable):
        fetcher.fetch(refs[:1])
    assert read_or_error_types(fetcher.fetch(refs[1:])) == ["b.jpg"]
    assert read_or_error_types(fetcher.fetch(refs[:1])) == ["unreadable"]


def test_credentials_that_expire_between_two_canary_reads_leave_no_row(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher
) -> None:
    refs = put_images(s3, "a.jpg", "b.jpg")
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


def test_canary_of_another_store_does_not_count(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher, tmp_path: Path
) -> None:
    local = tmp_path / "here.jpg"
    local.write_bytes(b"here")
    fetcher.fetch([ImageRef(0, str(local), str(local))])
    refs = put_images(s3, "a.jpg")
    deny(faulty, DENIED, "a.jpg")
    with pytest.raises(Unavailable):
        fetcher.fetch(refs)


def test_error_that_passes_before_the_retry_is_no_error(s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher) -> None:
    refs = put_images(s3, "a.jpg", "b.jpg")
    fetcher.fetch(refs[:1])
    denials = [DENIED]
    faulty.decide = lambda method, path: denials.pop() if path.endswith("b.jpg") and denials else None
    assert read_or_error_types(fetcher.fetch(refs[1:])) == ["b.jpg"]


def reply_in_order(*actions: Reply | str | None) -> Callable[[str, str], Reply | str | None]:
    remaining = list(actions)
    return lambda method, path: remaining.pop(0) if remaining else None


@pytest.fixture
def patient_fetcher(faulty: FaultProxy) -> Fetcher:
    """Fetcher that reads once before its retry timeout, and waits for the end of an outage."""
    return Fetcher(
        Reader({"s3://": StorageOptions(endpoint=faulty.endpoint)}, retry_timeout=0.05, outage_timeout=30), retries=2
    )


def test_silent_store_is_waited_for(s3: Seaweed, faulty: FaultProxy, patient_fetcher: Fetcher) -> None:
    refs = put_images(s3, "a.jpg", "b.jpg", "c.jpg")
    faulty.decide = reply_in_order(*[RESET] * 12)
    assert read_or_error_types(patient_fetcher.fetch(refs)) == ["a.jpg", "b.jpg", "c.jpg"], (
        "before anything could be read"
    )
    faulty.decide = reply_in_order(*[RESET] * 12)
    assert read_or_error_types(patient_fetcher.fetch(refs)) == ["a.jpg", "b.jpg", "c.jpg"], "in between"
    assert not patient_fetcher.reader.outage(refs[0].location).is_ongoing


def test_outage_over_its_timeout_is_raised_and_the_next_batch_does_not_wait_again(
    s3: Seaweed, faulty: FaultProxy, patient_fetcher: Fetcher
) -> None:
    refs = put_images(s3, "a.jpg", "b.jpg")
    patient_fetcher.fetch(refs)
    impatient_fetcher = replace(
        patient_fetcher, reader=Reader({"s3://": StorageOptions(endpoint=faulty.endpoint)}, 0.05, outage_timeout=1.0)
    )
    faulty.decide = lambda method, path: RESET
    for _ in range(2):
        with pytest.raises(Unavailable, match="does not answer"):
            impatient_fetcher.fetch(refs)
        faulty.requests.clear()
    faulty.decide = lambda method, path: None
    assert read_or_error_types(impatient_fetcher.fetch(refs)) == ["a.jpg", "b.jpg"]


def test_retries_is_the_number_of_further_reads_of_a_refused_object(
    s3: Seaweed, faulty: FaultProxy, patient_fetcher: Fetcher
) -> None:
    refs = put_images(s3, "a.jpg", "b.jpg")
    patient_fetcher.fetch(refs[:1])
    deny(faulty, DENIED, "b.jpg")
    for retries in (0, 1, 5):
        faulty.requests.clear()
        assert read_or_error_types(replace(patient_fetcher, retries=retries).fetch(refs[1:])) == ["unreadable"]
        assert sum(path.endswith("b.jpg") for _, path in faulty.requests) == 1 + retries


def test_refused_credentials_are_not_waited_for(s3: Seaweed, faulty: FaultProxy, patient_fetcher: Fetcher) -> None:
    refs = put_images(s3, "a.jpg", "b.jpg")
    patient_fetcher.fetch(refs)
    deny(faulty, DENIED, ".jpg")
    faulty.requests.clear()
    with pytest.raises(AccessDenied):
        patient_fetcher.fetch(refs)
    assert len(faulty.requests) == 2, "each image once; a read of the canary would tell nothing more"


def test_deleted_canary_still_shows_that_the_store_answers(s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher) -> None:
    refs = put_images(s3, "a.jpg", "b.jpg")
    fetcher.fetch(refs[:1])
    s3.delete(refs[0].location)
    deny(faulty, DENIED, "b.jpg")
    assert read_or_error_types(fetcher.fetch(refs[1:])) == ["unreadable"]


def test_unreadable_local_files_are_not_waited_for(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(Unavailable, match="cannot be read"):
        Fetcher(Reader(outage_timeout=300)).fetch([ImageRef(0, "loop", str(loop))])


def test_object_deleted_after_planning_is_an_error_that_says_so(s3: Seaweed, fetcher: Fetcher, tmp_path: Path) -> None:
    (ref,) = put_images(s3, "a.jpg")
    local = tmp_path / "b.jpg"
    local.write_bytes(b"b")
    planned = [ref, ImageRef(1, "b", str(local))]
    planned = [replace(one, etag=fetcher.reader.stat(one.location).etag) for one in planned]
    s3.delete(ref.location)
    local.unlink()
    for error in fetcher.fetch(planned):
        assert isinstance(error, ErrorRecord)
        assert (error.stage, error.type) == ("fetch", "deleted")
        assert "deleted since the plan was made" in error.message
    assert read_or_error_types(fetcher.fetch([replace(one, etag=None) for one in planned])) == ["not_found"] * 2, (
        "no ETag was planned"
    )


def test_refs_are_grouped_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.loader.fetch.MAX_FETCH_BYTES", 10)
    refs = [ImageRef(n, str(n), str(n), size=size) for n, size in enumerate([4, 6, 1, 30, None, 10])]
    assert [[ref.position for ref in group] for group in group_refs(refs)] == [[0, 1], [2], [3], [4, 5]]


def test_object_overwritten_after_planning_is_an_error_that_says_so(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher, tmp_path: Path
) -> None:
    refs = put_images(s3, "a.jpg", "b.jpg")
    etags = [fetcher.reader.stat(ref.location).etag for ref in refs]
    planned = [replace(ref, etag=etag) for ref, etag in zip(refs, etags, strict=True)]
    assert read_or_error_types(fetcher.fetch(planned)) == ["a.jpg", "b.jpg"]
    s3.put(refs[1].location, b"another")
    assert read_or_error_types(fetcher.fetch(planned)) == ["a.jpg", "changed"]
    assert read_or_error_types(fetcher.fetch(refs)) == ["a.jpg", "another"], "no ETag was planned"
    local = tmp_path / "c.jpg"
    local.write_bytes(b"c")
    ref = ImageRef(0, "c", str(local), etag=fetcher.reader.stat(str(local)).etag)
    assert read_or_error_types(fetcher.fetch([ref])) == ["c"]
    local.write_bytes(b"other")
    (error,) = fetcher.fetch([ref])
    assert isinstance(error, ErrorRecord)
    assert (error.stage, error.type) == ("fetch", "changed")
    assert "changed since the plan was made" in error.message


def test_object_that_is_too_large_or_changed_is_not_read(
    s3: Seaweed, faulty: FaultProxy, fetcher: Fetcher, tmp_path: Path
) -> None:
    bucket, local = s3.bucket(), tmp_path / "large.jpg"
    local.write_bytes(b"x" * 100_000)
    uris = [f"{bucket}large.jpg", f"{bucket}not\xa0printable.jpg"]  # the second is read through boto3
    for uri in uris:
        s3.put(uri, local.read_bytes())
    etags = [fetcher.reader.stat(uri).etag for uri in uris]
    faulty.decide = lambda method, path: TRUNCATE if method == "GET" else None  # a read of the whole object fails
    for uri in (*uris, str(local)):
        (error,) = replace(fetcher, max_bytes=1000).fetch([ImageRef(0, uri, uri)])
        assert error == ErrorRecord("fetch", "too_large", "the file has 100,000 bytes, over decode.max_bytes 1,000")
    for uri, etag in zip(uris, etags, strict=True):
        (error,) = fetcher.fetch([ImageRef(0, uri, uri, etag="planned")])
        assert error == ErrorRecord("fetch", "changed", f"{uri}: changed since the plan was made (planned, now {etag})")
    assert len([1 for method, _ in faulty.requests if method == "GET"]) == 4, "each once"


def test_too_large_file_of_any_fsspec_protocol_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/limits/fine": b"x" * 1000, "/limits/large": b"x" * 1001})
    read: list[str] = []
    cat = type(memory).cat_file

    def record_read(self: object, path: str, **more: object) -> bytes:
        read.append(path)
        return bytes(cat(self, path, **more))

    monkeypatch.setattr(type(memory), "cat_file", record_read)
    uris = ["memory://limits/fine", "memory://limits/large"]
    answers = Fetcher(Reader(retry_timeout=0.0), max_bytes=1000).fetch(
        [ImageRef(n, uri, uri) for n, uri in enumerate(uris)]
    )
    assert isinstance(answers[0], ObjectData)
    assert answers[1] == ErrorRecord("fetch", "too_large", "the file has 1,001 bytes, over decode.max_bytes 1,000")
    assert read == ["/limits/fine"]
