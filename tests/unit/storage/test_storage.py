"""Reader and Store on local disks, on a real S3 server, and on one that breaks."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import pickle
import socket
import stat
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjob.errors import (
    AccessDenied,
    AddressRefused,
    AlreadyExists,
    BatchjobError,
    InvalidJob,
    NotFound,
    PreconditionFailed,
    UnaddressableKey,
    Unavailable,
)
from batchjob.storage import local_backend
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.options import StorageOptions
from batchjob.storage.outage import Outage
from batchjob.storage.probe import probe_store
from batchjob.storage.reader import Reader
from batchjob.storage.store import Store, open_store, put_or_get
from tests.support.fault_proxy import LOSE_ANSWER, RESET, TRUNCATE, FaultProxy, RandomFaults, Reply, run_fault_proxy
from tests.support.memory_store import MemoryStore
from tests.support.seaweed import Seaweed

# Keys found in real buckets, in the order of their UTF-8 bytes. No two of them are the same file on a local disk.
UNUSUAL_NAMES = sorted(
    [
        "a b.jpg",
        "a+b",
        "p%2Fq",
        "pct%zz",
        "h#1",
        "q?x=1",
        "ü/x",
        "e\u0301",
        "😀",
        "*.jpg",
        "[1]",
        "c:x,y",
        '"q"',
        "a&<b",
    ],
    key=str.encode,
)


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty output."""
    if request.param == "disk":
        return str(tmp_path / "out")
    s3: Seaweed = request.getfixturevalue("s3")
    return s3.bucket() + "out"


@pytest.fixture
def store(root: str) -> Store:
    return open_store(root)


@pytest.fixture
def proxy(s3: Seaweed) -> Iterator[FaultProxy]:
    with run_fault_proxy(s3.endpoint) as server:
        yield server


def options_through(proxy: FaultProxy) -> dict[str, StorageOptions]:
    return {"s3://": StorageOptions(endpoint=proxy.endpoint)}


def uris_of(found: Iterator[ObjectInfo]) -> list[str]:
    return [one.uri for one in found]


# --- methods of a Store ----------------------------------------------------------------------------------------------


def test_read_returns_what_was_put(store: Store) -> None:
    body = bytes(range(256))
    done = store.put_if_absent("predictions/part.parquet", body)
    assert (done.uri, done.size) == ("predictions/part.parquet", 256)
    blob = store.read(done.uri)
    assert (blob.data, blob.etag, blob.version) == (body, done.etag, done.version)
    assert store.stat(done.uri) == done
    assert list(store.list("predictions/")) == [done]
    assert done.etag is not None
    assert '"' not in done.etag
    assert (store.read_tail(done.uri, 8), store.read_tail(done.uri, 999)) == (body[-8:], body)
    assert (store.read_head(done.uri, 4), store.read_head(done.uri, 999)) == (body[:4], body)


def test_put_of_a_file_stores_its_bytes(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(os.urandom(3 << 20))
    first = store.put_if_absent("a/part", path)
    assert first.size == 3 << 20
    assert store.read("a/part").data == path.read_bytes()
    path.write_bytes(b"second")
    assert store.replace_if_match("a/part", path, str(first.version)).size == 6
    assert store.read("a/part").data == b"second"


def test_head_and_tail_of_an_empty_object_are_empty(store: Store) -> None:
    store.put_if_absent("empty", b"")
    assert (store.read("empty").data, store.read_head("empty", 8), store.read_tail("empty", 8)) == (b"", b"", b"")


def test_second_create_fails_and_changes_nothing(store: Store) -> None:
    store.put_if_absent("a", b"first")
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a", b"second")
    assert store.read("a").data == b"first"


def test_replace_requires_the_stored_version(store: Store) -> None:
    first = store.put_if_absent("a", b"1")
    second = store.replace_if_match("a", b"2", str(first.version))
    assert second.version != first.version
    with pytest.raises(PreconditionFailed):
        store.replace_if_match("a", b"3", str(first.version))
    assert store.read("a").data == b"2"
    store.delete("a")
    with pytest.raises(PreconditionFailed):
        store.replace_if_match("a", b"3", str(second.version))
    with pytest.raises(NotFound):
        store.read("a")


def test_absent_object_is_not_found_and_its_delete_succeeds(store: Store) -> None:
    calls: list[Callable[[str], object]] = [store.read, store.stat]
    calls += [lambda key: store.read_tail(key, 8), lambda key: store.read_head(key, 8)]
    for call in calls:
        with pytest.raises(NotFound, match="absent"):
            call("some/absent")
    store.delete("some/absent")
    assert list(store.list("")) == []
    assert list(store.list("some/")) == []


def test_list_filters_by_prefix_in_key_order(store: Store) -> None:
    for key in ["b/2", "a", "b/10", "b/1", "c/d/e", "bb"]:
        store.put_if_absent(key, b"")
    assert uris_of(store.list("b/")) == ["b/1", "b/10", "b/2"]
    assert sorted(uris_of(store.list(""))) == ["a", "b/1", "b/10", "b/2", "bb", "c/d/e"]


def test_one_of_several_racing_threads_creates(store: Store) -> None:
    def create(number: int) -> bool:
        try:
            store.put_if_absent(f"race/{number // 8}", b"%d" % number)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(create, range(40)))
    for start in range(0, 40, 8):
        assert wins[start : start + 8].count(True) == 1
        winner = start + wins[start : start + 8].index(True)
        assert store.read(f"race/{start // 8}").data == b"%d" % winner


def increment(uri: str, times: int) -> int:
    """Add 1 to a number of fixed width, `times` times; return how often the replacement lost."""
    store, lost, done = open_store(uri), 0, 0
    while done < times:
        blob = store.read("count")
        try:
            store.replace_if_match("count", b"%06d" % (int(blob.data) + 1), str(blob.version))
            done += 1
        except PreconditionFailed:
            lost += 1
    return lost


def create_each(uri: str, names: list[str], who: bytes) -> list[bool]:
    store, wins = open_store(uri), []
    for name in names:
        try:
            store.put_if_absent(name, who)
            wins.append(True)
        except AlreadyExists:
            wins.append(False)
    return wins


def test_racing_replacements_lose_no_update(root: str) -> None:
    open_store(root).put_if_absent("count", b"%06d" % 0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(increment, [root] * 4, [15] * 4))
    assert int(open_store(root).read("count").data) == 60


def test_one_of_several_racing_processes_creates_on_disk(tmp_path: Path) -> None:
    root, names = str(tmp_path / "out"), [f"race/{n}" for n in range(100)]
    open_store(root).put_if_absent("count", b"%06d" % 0)
    with multiprocessing.get_context("forkserver").Pool(3) as pool:
        wins = pool.starmap(create_each, [(root, names, b"%d" % who) for who in range(3)])
        pool.starmap(increment, [(root, 50)] * 3)
    assert [sum(won) for won in zip(*wins, strict=True)] == [1] * 100
    assert int(open_store(root).read("count").data) == 150


def test_store_can_be_pickled(store: Store) -> None:
    store.put_if_absent("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a").data == b"1"


def test_probe_accepts_disk_and_server_and_leaves_nothing(store: Store) -> None:
    probe_store(store)
    assert list(store.list("")) == []


class FirstWriterLosesStore(MemoryStore):
    """A faulty store, as the probe must refuse it: a create succeeds although the object exists."""

    def __init__(self, is_correct_alone: bool) -> None:
        super().__init__()
        self._is_correct_alone = is_correct_alone

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        if self._is_correct_alone and key.endswith("/twice"):  # correct with one writer at a time
            return super().put_if_absent(key, body)
        with suppress(AlreadyExists):
            return super().put_if_absent(key, body)
        return ObjectInfo(key, len(body) if isinstance(body, bytes) else 0)


@pytest.mark.parametrize("is_correct_alone", [False, True])
def test_probe_refuses_a_store_where_two_writers_win(is_correct_alone: bool) -> None:
    with pytest.raises(InvalidJob, match="two writers"):
        probe_store(FirstWriterLosesStore(is_correct_alone))


@pytest.mark.parametrize("uri", ["http://host/out", "memory://out", "hf://datasets/x"])
def test_output_without_conditional_create_is_refused(uri: str) -> None:
    with pytest.raises(InvalidJob, match=r"no conditional create.*use a local path, s3://, gs:// or az://"):
        open_store(uri)


@pytest.mark.parametrize("uri", ["s3://bucket/a//b", "s3://bucket/a/../b", "s3://bucket/./b"])
def test_output_prefix_that_cannot_be_named_is_refused(uri: str) -> None:
    with pytest.raises(InvalidJob, match="plain prefix"):
        open_store(uri)


def test_output_without_bucket_is_refused() -> None:
    with pytest.raises(InvalidJob, match="names no bucket"):
        open_store("s3://")


def test_azure_container_without_account_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ENDPOINT",
        "AZURE_ENDPOINT",
        "AZURE_STORAGE_USE_EMULATOR",
    ):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidJob, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container/out", {"az://": StorageOptions(anonymous=True)})


@pytest.mark.parametrize("uri", ["gs://bucket/images/a", "abfss://container@account.dfs.core.windows.net/images/a"])
def test_gcs_and_azure_are_read_by_the_same_methods(proxy: FaultProxy, uri: str) -> None:
    """Only the HTTP requests, anonymously: no GCS or Azure server is part of these tests."""
    headers = {"etag": '"tag"', "x-goog-generation": "77", "last-modified": "Sat, 21 Nov 2026 01:00:00 GMT"}
    proxy.decide = lambda method, path: Reply(200, b"1", headers) if "absent" not in path else Reply(404)
    options = {uri.partition("://")[0] + "://": StorageOptions(endpoint=proxy.endpoint, anonymous=True)}
    store, reader = open_store(uri.rpartition("/")[0], options), Reader(options)
    version = "77" if uri.startswith("gs") else '"tag"'
    assert reader.read(uri) == ObjectData(b"1", "tag", version)
    assert store.stat("a") == ObjectInfo("a", 1, "tag", version)
    with pytest.raises(NotFound):
        store.read("absent")


# --- local disks -----------------------------------------------------------------------------------------------------


def test_temporary_files_are_not_listed_and_stale_ones_are_deleted(tmp_path: Path) -> None:
    leftovers = [tmp_path / "_batchjob" / "tmp" / name for name in ("fresh", "stale")]
    leftovers[0].parent.mkdir(parents=True)
    for path in leftovers:
        path.write_bytes(b"half a part")
    os.utime(leftovers[1], (0, 0))
    store = open_store(str(tmp_path))
    store.put_if_absent("predictions/part", b"whole")
    assert uris_of(store.list("predictions/")) == ["predictions/part"]
    assert uris_of(store.list("")) == ["predictions/part"]
    assert [path.exists() for path in leftovers] == [True, False]


def test_failed_put_leaves_no_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    with pytest.raises(BatchjobError):
        store.put_if_absent("predictions/part", tmp_path / "absent")
    store.put_if_absent("a", b"1")
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a", b"2")
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"a"}


def test_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidJob, match=r"file/out.*cannot be written \(Not a directory\)"):
        open_store(str(tmp_path / "file" / "out")).put_if_absent("a", b"1")


def test_read_only_folder_can_be_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        store.put_if_absent("a", b"1")
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        user = os.geteuid()
        if not user:
            os.seteuid(65534)  # root may write anywhere
        try:
            assert store.read("a").data == b"1"
            assert uris_of(store.list("")) == ["a"]
            with pytest.raises(InvalidJob, match=r"cannot be written \(Permission denied\)"):
                store.put_if_absent("b", b"1")
            with pytest.raises(InvalidJob, match="cannot be written"):
                probe_store(store)
        finally:
            if not user:
                os.seteuid(user)
            for path in (Path(folder), *Path(folder).rglob("*")):
                path.chmod(0o755)


def test_versions_written_within_one_clock_tick_differ(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    seen = [store.put_if_absent("a", b"0").version]
    for number in range(50):
        seen.append(store.replace_if_match("a", b"%d" % (number % 10), str(seen[-1])).version)
    assert len(set(seen)) == 51


def test_committed_file_has_one_link_and_the_default_mode(tmp_path: Path) -> None:
    open_store(str(tmp_path)).put_if_absent("a", b"1")
    found = (tmp_path / "a").stat()
    (tmp_path / "plain").write_bytes(b"")
    assert found.st_nlink == 1
    assert stat.S_IMODE(found.st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_local_listing_is_in_byte_order_and_resumes_anywhere(tmp_path: Path) -> None:
    names = ["B", "a-b", "a.jpg", "a/x", "a/y-1", "a/y/z", "a/y.jpg", "a0", "z/.hidden", "z/é", "ä", "😀/1"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "empty" / "folders").mkdir(parents=True)
    expected = [f"{tmp_path}/{name}" for name in sorted(names, key=str.encode)]
    reader = Reader()
    assert uris_of(reader.list(str(tmp_path))) == expected
    assert uris_of(reader.list(f"{tmp_path}/")) == expected
    assert uris_of(reader.list(f"file://{tmp_path}/")) == [f"file://{uri}" for uri in expected]
    for number, uri in enumerate(expected):
        assert uris_of(reader.list(str(tmp_path), after=uri)) == expected[number + 1 :]
    for gone in ("a/", "a/y", "a/y/", "a/zz", "A", "zzz", "z"):
        after = f"{tmp_path}/{gone}"
        later = [uri for uri in expected if uri.encode() > after.encode()]
        assert uris_of(reader.list(str(tmp_path), after=after)) == later
    flat = [uri for uri in expected if "/" not in uri.removeprefix(f"{tmp_path}/")]
    assert uris_of(reader.list(str(tmp_path), recursive=False)) == flat
    for found in reader.list(str(tmp_path)):
        assert found == reader.stat(found.uri)
        assert reader.read(found.uri, found.etag).data.decode() == found.uri.removeprefix(f"{tmp_path}/")


def test_folder_with_more_names_than_the_limit_is_listed_completely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number:03}" for number in range(100)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(local_backend, "_MAX_NAMES", 7)
    assert [found.uri for found in local_backend.walk(tmp_path)] == names
    assert [found.uri for found in local_backend.walk(tmp_path, "041")] == names[42:]


def test_links_are_followed_without_loops(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.jpg").write_bytes(b"one")
    (tmp_path / "file.jpg").symlink_to("real/1.jpg")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "real" / "up").symlink_to("..")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    os.mkfifo(tmp_path / "pipe")
    found = {one.uri.removeprefix(f"{tmp_path}/"): one.size for one in Reader().list(str(tmp_path))}
    assert found == {"file.jpg": 3, "folder/1.jpg": 3, "gone.jpg": 0, "real/1.jpg": 3, "self": 0}


def test_names_that_are_not_utf8_are_read_and_impossible_names_refused(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg"
    try:
        (tmp_path / os.fsdecode(name)).write_bytes(b"latin")
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    (found,) = Reader().list(str(tmp_path))
    assert os.fsencode(found.uri).endswith(name)
    assert Reader().read(found.uri).data == b"latin"
    for impossible in ("nul\0", "x" * 300, "\ud800"):
        with pytest.raises(UnaddressableKey):
            Reader().read(f"{tmp_path}/{impossible}")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name in ("pipe", "folder", "absent", "file/below"):
        for call in (Reader().read, Reader().stat, Reader().open):
            with pytest.raises(NotFound):
                call(f"{tmp_path}/{name}")


def test_read_with_an_old_etag_fails(root: str) -> None:
    store, reader = open_store(root), Reader()
    first = store.put_if_absent("a", b"1")
    assert reader.read(f"{root}/a", first.etag).data == b"1"
    store.replace_if_match("a", b"2", str(first.version))
    with pytest.raises(PreconditionFailed, match="changed since the plan was made"):
        reader.read(f"{root}/a", first.etag)


# --- reading from S3 -------------------------------------------------------------------------------------------------


def test_unusual_names_are_listed_and_read(root: str, request: pytest.FixtureRequest) -> None:
    for name in UNUSUAL_NAMES:
        if root.startswith("s3://"):
            request.getfixturevalue("s3").put(f"{root}/{name}", name.encode())
        else:
            Path(root, name).parent.mkdir(parents=True, exist_ok=True)
            Path(root, name).write_bytes(name.encode())
    reader = Reader()
    expected = [f"{root}/{name}" for name in UNUSUAL_NAMES]
    assert uris_of(reader.list(root)) == expected
    for number, found in enumerate(reader.list(root)):
        assert reader.stat(found.uri) == found
        assert reader.read(found.uri).data == UNUSUAL_NAMES[number].encode()
        assert uris_of(reader.list(root, after=found.uri)) == expected[number + 1 :]
    assert [blob.data for blob in reader.read_many(expected) if isinstance(blob, ObjectData)] == list(
        map(str.encode, UNUSUAL_NAMES)
    )


def test_read_many_returns_results_and_errors_in_order(s3: Seaweed, tmp_path: Path) -> None:
    root = s3.bucket()
    for number in range(40):
        s3.put(f"{root}{number}", b"%d" % number)
    (tmp_path / "local").write_bytes(b"local")
    fsspec.filesystem("memory").pipe("/many/1", b"memory")
    uris = [f"{root}{number}" for number in range(40)] + [f"{root}absent", f"{root}x/../y", "memory://many/1"]
    uris += [str(tmp_path / "local"), str(tmp_path / "absent")]
    answers = Reader().read_many(uris)
    assert [blob.data for blob in answers[:40] if isinstance(blob, ObjectData)] == [
        b"%d" % number for number in range(40)
    ]
    kinds = [type(answer) for answer in answers[40:]]
    assert kinds == [NotFound, UnaddressableKey, ObjectData, ObjectData, NotFound]
    assert Reader().read_many([]) == []


def test_pickled_reader_serves_threads(s3: Seaweed) -> None:
    uri = s3.bucket() + "a"
    s3.put(uri, b"1")
    reader = Reader()
    assert reader.read(uri).data == b"1"
    again = pickle.loads(pickle.dumps(reader))
    with ThreadPoolExecutor(8) as pool:
        assert [blob.data for blob in pool.map(again.read, [uri] * 50)] == [b"1"] * 50


def test_folder_listing_ends_at_its_slash(s3: Seaweed) -> None:
    root = s3.bucket()
    for key in ("day=1/a", "day=1/sub/b", "day=10/c", "day=1"):
        s3.put(root + key, b"1")
    assert uris_of(Reader().list(root + "day=1")) == [root + "day=1/a", root + "day=1/sub/b"]
    assert uris_of(Reader().list(root + "day=1/", recursive=False)) == [root + "day=1/a"]
    assert uris_of(Reader().list(root + "absent")) == []


def test_folder_marker_is_not_listed_but_an_empty_file_is(s3: Seaweed) -> None:
    root = s3.bucket()
    s3.put(root + "folder/", b"")
    s3.put(root + "folder/a", b"1")
    s3.put(root + "empty", b"")
    assert uris_of(Reader().list(root)) == [root + "empty", root + "folder/a"]


def test_whole_bucket_is_listed(s3: Seaweed) -> None:
    s3.bucket("whole")
    s3.put("s3://whole/a/1", b"1")
    s3.put("s3://whole/b", b"1")
    for uri in ("s3://whole", "s3://whole/"):
        assert uris_of(Reader().list(uri)) == ["s3://whole/a/1", "s3://whole/b"]
    assert uris_of(Reader().list("s3://whole", after="s3://whole/a/1")) == ["s3://whole/b"]


def test_object_opens_as_a_seekable_file(root: str, tmp_path: Path) -> None:
    table = pa.table({"uri": [f"image-{number}" for number in range(100_000)]})
    pq.write_table(table, tmp_path / "manifest", row_group_size=10_000)
    open_store(root).put_if_absent("manifest.parquet", tmp_path / "manifest")
    with Reader().open(f"{root}/manifest.parquet") as file:
        assert pq.ParquetFile(file).read_row_group(7).column("uri")[0].as_py() == "image-70000"
        assert file.seek(-4, os.SEEK_END)
        assert file.read() == b"PAR1"
        assert file.read(1) == b""
    with pytest.raises(NotFound):
        Reader().open(f"{root}/absent")


def test_unknown_bucket_is_reported(s3: Seaweed) -> None:
    with pytest.raises(InvalidJob, match="no such bucket"):
        list(Reader().list("s3://never-made/images/"))
    with pytest.raises(NotFound):
        Reader().read("s3://never-made/images/1.jpg")


def test_longest_matching_option_prefix_wins(s3: Seaweed) -> None:
    uri = s3.bucket() + "a"
    s3.put(uri, b"1")
    bucket = uri.rpartition("/")[0]
    dead = StorageOptions(endpoint="http://127.0.0.1:9")
    right = StorageOptions(endpoint=s3.endpoint)
    assert Reader({"s3://": dead, bucket: right}, retry_timeout=0).read(uri).data == b"1"
    assert Reader({"s3://tes": dead, "s3://tests-2": dead, "gs://": dead}).read(uri).data == b"1"
    with pytest.raises(Unavailable):
        Reader({"s3://": right, bucket: dead}, retry_timeout=0).read(uri)


def test_storage_option_wins_over_the_environment(s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.bucket() + "a"
    s3.put(uri, b"1")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Reader({"s3://": StorageOptions(endpoint=s3.endpoint)}, retry_timeout=0).read(uri).data == b"1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    assert Reader(retry_timeout=0).read(uri).data == b"1"
    assert uris_of(Reader(retry_timeout=0).list(uri.rpartition("/")[0])) == [uri]


def test_anonymous_and_requester_pays_reach_the_server(s3: Seaweed, proxy: FaultProxy) -> None:
    uri = s3.bucket() + "a"
    s3.put(uri, b"1")
    public = {"s3://": StorageOptions(endpoint=s3.endpoint, anonymous=True)}
    with pytest.raises(Unavailable, match="AccessDenied"):  # the request is not signed, and this bucket is not public
        Reader(public).read(uri)
    with pytest.raises(Unavailable, match="AccessDenied"):
        list(Reader(public).list("s3://tests"))
    payer = {"s3://": StorageOptions(endpoint=proxy.endpoint, requester_pays=True)}
    assert Reader(payer).read(uri).data == b"1"
    with pytest.raises(InvalidJob, match="s3:// only"):
        Reader({"gs://": StorageOptions(requester_pays=True)}).read("gs://bucket/a")


# --- a server with keys that only Amazon S3 has ----------------------------------------------------------------------


@pytest.fixture
def dict_server(proxy: FaultProxy) -> tuple[FaultProxy, dict[str, bytes]]:
    """A proxy that answers reads and listings from a dict.

    SeaweedFS folds `a//b` into `a/b` and refuses `..`; Amazon S3 does not.
    """
    objects: dict[str, bytes] = {}

    def decide(method: str, path: str) -> Reply:
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if "list-type" in query:
            return Reply(200, render_listing(objects, query), {"content-type": "application/xml"})
        key = unquote(parts.path.split("/", 2)[2])
        if key not in objects:
            return Reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        data = objects[key]
        headers = {"etag": f'"{len(data)}"', "last-modified": "Sat, 21 Nov 2026 01:00:00 GMT"}
        return Reply(200, data, {**headers, "content-length": str(len(data))})

    proxy.decide = decide
    return proxy, objects


def render_listing(objects: dict[str, bytes], query: dict[str, str]) -> bytes:
    after = query.get("continuation-token") or query.get("start-after", "")
    prefix = query.get("prefix", "")
    fits = [key for key in sorted(objects, key=str.encode) if key.startswith(prefix) and key.encode() > after.encode()]
    if "delimiter" in query:
        fits = [key for key in fits if "/" not in key.removeprefix(prefix)]
    page = fits[: 2 if len(objects) < 20 else 1000]
    more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(fits) > len(page) else ""
    rows = (
        f'<Contents><Key>{escape(key)}</Key><Size>{len(objects[key])}</Size><ETag>"{len(objects[key])}"</ETag>'
        "<LastModified>2026-11-21T01:00:00.000Z</LastModified></Contents>"
        for key in page
    )
    truncated = "true" if more else "false"
    body = f"<IsTruncated>{truncated}</IsTruncated>{more}{''.join(rows)}<KeyCount>{len(page)}</KeyCount>"
    return f"<ListBucketResult><Name>odd</Name><Prefix>{escape(prefix)}</Prefix>{body}</ListBucketResult>".encode()


def test_keys_that_obstore_cannot_name_are_listed_and_read(dict_server: tuple[FaultProxy, dict[str, bytes]]) -> None:
    proxy, objects = dict_server
    names = ["in/1.jpg", "in/2.jpg", "in/a/../c.jpg", "in/a/./d.jpg", "in/a//b.jpg", "in/m/", "in/m/é.jpg", "in/~"]
    objects.update(
        {name: name.encode() for name in names if not name.endswith("/")}, **{"in/m/": b"", "/in/3.jpg": b"3"}
    )
    expected = [f"s3://odd/{name}" for name in names if not name.endswith("/")]
    reader = Reader(options_through(proxy))
    assert uris_of(reader.list("s3://odd/in/")) == expected
    for number, uri in enumerate(expected):
        assert reader.read(uri).data == uri.removeprefix("s3://odd/").encode()
        assert reader.stat(uri).size == len(uri.removeprefix("s3://odd/").encode())
        assert uris_of(reader.list("s3://odd/in/", after=uri)) == expected[number + 1 :]
        with reader.open(uri) as file:
            assert file.seek(0, os.SEEK_END) == len(uri.removeprefix("s3://odd/").encode())
    assert uris_of(reader.list("s3://odd/in/", recursive=False)) == [expected[0], expected[1], expected[-1]]
    assert uris_of(reader.list("s3://odd/in/a//")) == ["s3://odd/in/a//b.jpg"]
    assert uris_of(reader.list("s3://odd")) == ["s3://odd//in/3.jpg", *expected]
    assert reader.read("s3://odd//in/3.jpg").data == b"3"
    with pytest.raises(NotFound):
        reader.read("s3://odd/in//absent.jpg")


def test_listing_streams_page_by_page(dict_server: tuple[FaultProxy, dict[str, bytes]]) -> None:
    proxy, objects = dict_server
    objects.update({f"in/{number:04}": b"1" for number in range(5000)})
    for recursive in (True, False):
        proxy.requests.clear()
        found = Reader(options_through(proxy)).list("s3://odd/in", recursive=recursive)
        assert next(found).uri == "s3://odd/in/0000"
        assert len(proxy.requests) < 4
        assert (len(list(found)), len(proxy.requests)) == (4999, 5)


# --- faults ----------------------------------------------------------------------------------------------------------


def fault_first(count: int, action: Reply | str, method: str = "") -> Callable[[str, str], Reply | str | None]:
    left = [count]

    def decide(seen: str, path: str) -> Reply | str | None:
        if method in ("", seen) and left[0]:
            left[0] -= 1
            return action
        return None

    return decide


TRANSIENT = [
    Reply(503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"),
    Reply(500, b"<Error><Code>InternalError</Code></Error>"),
    Reply(429),
    RESET,
]


@pytest.mark.parametrize("action", TRANSIENT, ids=["503", "500", "429", "reset"])
def test_transient_faults_are_retried(s3: Seaweed, proxy: FaultProxy, action: Reply | str) -> None:
    root = s3.bucket()
    s3.put(root + "in/a", b"1")
    reader, store = Reader(options_through(proxy)), open_store(root, options_through(proxy))
    calls: list[Callable[[], object]] = [
        lambda: reader.read(root + "in/a"),
        lambda: reader.stat(root + "in/a"),
        lambda: list(reader.list(root + "in")),
        lambda: list(reader.list(root + "in", recursive=False)),
        lambda: reader.read(root + "in//a"),
        lambda: store.put_if_absent("b", b"2"),
    ]
    for call in calls:
        proxy.decide = fault_first(1, action)
        assert call()
    assert s3.get(root + "b") == b"2"


@pytest.mark.parametrize("action", [*TRANSIENT[:1], RESET], ids=["503", "reset"])
def test_lasting_faults_are_unavailable_in_bounded_time(s3: Seaweed, proxy: FaultProxy, action: Reply | str) -> None:
    root = s3.bucket()
    proxy.decide = lambda method, path: action
    reader, store = (
        Reader(options_through(proxy), retry_timeout=0.2),
        open_store(root, options_through(proxy), retry_timeout=0.2),
    )
    calls: list[Callable[[], object]] = [
        lambda: reader.read(root + "a"),
        lambda: reader.stat(root + "a//b"),
        lambda: list(reader.list(root)),
        lambda: store.put_if_absent("b", b"2"),
        lambda: store.delete("b"),
    ]
    for call in calls:
        with pytest.raises(Unavailable, match=r"s3://tests/.*does not answer.*run again"):
            call()


def test_dead_server_costs_read_many_one_timeout(s3: Seaweed) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        options = {"s3://": StorageOptions(endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}")}
        start = time.monotonic()
        answers = Reader(options, retry_timeout=0.5).read_many([f"s3://tests/{number}" for number in range(300)])
    assert {type(answer) for answer in answers} == {Unavailable}
    assert time.monotonic() - start < 30  # 300 timeouts in 32 threads, with back-off, would take far longer


class Clock:
    """A clock whose time passes only in `sleep`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def make_unanswered(clock: Clock, times: int, seconds: float) -> Callable[[], str]:
    """Return a request that is not answered `times` times, each time after `seconds`."""
    left = [times]

    def call() -> str:
        if left[0]:
            left[0] -= 1
            clock.now += seconds
            raise Unavailable("s3://b/a: the store does not answer (reset); check the network, then run again")
        return "answer"

    return call


def test_short_outage_is_waited_out_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    outage = Outage(300, clock, clock.sleep)
    assert outage.retry_until_answered(make_unanswered(clock, 9, 30)) == "answer"
    assert 270 <= clock.now - 100 < 300
    assert not outage.is_ongoing
    (message,) = caplog.messages
    assert message == "s3://b/a: the store does not answer (reset); it is asked again for up to 300 s"


def test_long_outage_is_raised_and_the_next_request_is_sent_once() -> None:
    clock = Clock()
    outage = Outage(300, clock, clock.sleep)
    with pytest.raises(Unavailable, match=r"the store does not answer \(reset\), for 3\d\d s now; check the network"):
        outage.retry_until_answered(make_unanswered(clock, 99, 30))
    assert 300 <= clock.now - 100 <= 335
    assert outage.timed_out
    before = clock.now
    with pytest.raises(Unavailable):
        outage.retry_until_answered(make_unanswered(clock, 99, 30))
    assert clock.now == before + 30
    assert outage.retry_until_answered(make_unanswered(clock, 0, 0)) == "answer"
    assert not outage.timed_out


def test_unanswered_request_times_out_although_others_are_answered() -> None:
    clock = Clock()
    outage = Outage(60, clock, clock.sleep)
    request = make_unanswered(clock, 99, 5)

    def call() -> str:
        outage.record_answer()  # another request was answered
        return request()

    with pytest.raises(Unavailable):
        outage.retry_until_answered(call)
    assert clock.now - 100 <= 70


def test_denied_access_and_definite_answers_are_raised_at_once() -> None:
    clock = Clock()
    outage = Outage(300, clock, clock.sleep)

    def answer(error: BatchjobError) -> None:
        raise error

    for error in (AccessDenied("s3://b/a: access denied"), NotFound("s3://b/a: not there")):
        with pytest.raises(type(error)):
            outage.retry_until_answered(lambda error=error: answer(error))  # type: ignore[misc]
    assert clock.now == 100


@pytest.mark.parametrize("action", [RESET, LOSE_ANSWER, TRUNCATE, Reply(503)], ids=["reset", "lost", "cut", "503"])
def test_every_method_retries_a_silent_store(s3: Seaweed, proxy: FaultProxy, action: Reply | str) -> None:
    """Every method, with a retry timeout that is far too short for the fault."""
    root = s3.bucket()
    s3.put(root + "in/a", b"12")
    reader = Reader(options_through(proxy), retry_timeout=0.01, outage_timeout=30)
    store = open_store(root, options_through(proxy), retry_timeout=0.01, outage=30)
    calls: list[Callable[[], object]] = [
        lambda: reader.read(root + "in/a").data == b"12",
        lambda: reader.stat(root + "in/a").size == 2,
        lambda: uris_of(reader.list(root + "in")) == [root + "in/a"],
        lambda: uris_of(reader.list(root + "in", recursive=False)) == [root + "in/a"],
        lambda: store.read_tail("in/a", 1) == b"2",
        lambda: put_or_get(store, "settled", b"1") == b"1",
    ]
    for call in calls:
        proxy.decide = fault_first(2, action)
        assert call()
    proxy.decide = fault_first(2, action)
    store.delete("settled")
    assert s3.keys(root) == ["in/a"]


def test_broken_listing_resumes_after_its_last_object(dict_server: tuple[FaultProxy, dict[str, bytes]]) -> None:
    proxy, objects = dict_server
    objects.update({f"in/{number:04}": b"1" for number in range(3000)})
    serve, breaks = proxy.decide, RandomFaults(7, throttled=0.3, reset=0.3)
    proxy.decide = lambda method, path: breaks(method, path) or serve(method, path)
    found = uris_of(Reader(options_through(proxy), retry_timeout=0.1, outage_timeout=60).list("s3://odd/in"))
    assert found == [f"s3://odd/in/{number:04}" for number in range(3000)]


def test_retry_timeout_comes_from_the_environment(s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHJOB_PATIENCE", "0.2")
    with pytest.raises(Unavailable, match=r"http|does not answer"):
        Reader({"s3://": StorageOptions(endpoint="http://127.0.0.1:9")}).read("s3://tests/a")


def test_lost_answer_to_a_create_is_left_to_the_caller(s3: Seaweed, proxy: FaultProxy) -> None:
    root = s3.bucket()
    store = open_store(root, options_through(proxy))
    proxy.decide = fault_first(1, LOSE_ANSWER, "PUT")
    # The repeated PUT meets our own first one, which must not be taken for a rival's.
    with pytest.raises((AlreadyExists, Unavailable)):
        store.put_if_absent("a", b"ours")
    assert store.read("a").data == b"ours"


def test_lost_answer_to_a_replace_is_left_to_the_caller(s3: Seaweed, proxy: FaultProxy) -> None:
    store = open_store(s3.bucket(), options_through(proxy))
    first = store.put_if_absent("a", b"1")
    proxy.decide = fault_first(1, LOSE_ANSWER, "PUT")
    with pytest.raises((PreconditionFailed, Unavailable)):
        store.replace_if_match("a", b"2", str(first.version))
    assert store.read("a").data == b"2"


@pytest.mark.parametrize("status", [409, 412])
def test_conflict_that_stored_nothing_is_already_exists(s3: Seaweed, proxy: FaultProxy, status: int) -> None:
    root = s3.bucket()
    store = open_store(root, options_through(proxy), retry_timeout=0.5)
    body = b"<Error><Code>ConditionalRequestConflict</Code><Message>being written</Message></Error>"
    proxy.decide = lambda method, path: Reply(status, body) if method == "PUT" else None
    with pytest.raises((AlreadyExists, Unavailable)):
        store.put_if_absent("a", b"1")
    with pytest.raises((PreconditionFailed, Unavailable)):
        store.replace_if_match("a", b"1", '"x"')
    assert s3.keys(root) == []


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "ExpiredToken"), (403, "InvalidAccessKeyId"), (403, "AccessDenied"), (401, "Unauthorized")],
)
def test_refused_credentials_are_reported_at_once(s3: Seaweed, proxy: FaultProxy, status: int, code: str) -> None:
    root = s3.bucket()
    body = f"<Error><Code>{code}</Code><Message>no good</Message><AWSAccessKeyId>AKIASECRET</AWSAccessKeyId></Error>"
    proxy.decide = lambda method, path: Reply(status, body.encode())
    reader, store = Reader(options_through(proxy)), open_store(root, options_through(proxy))
    calls: list[Callable[[], object]] = [
        lambda: reader.read(root + "a"),
        lambda: reader.read(root + "a//b"),
        lambda: reader.stat(root + "a"),
        lambda: list(reader.list(root)),
        lambda: list(reader.list(root, recursive=False)),
        lambda: store.put_if_absent("a", b"1"),
        lambda: store.replace_if_match("a", b"1", '"x"'),
        lambda: store.delete("a"),
    ]
    for call in calls:
        proxy.requests.clear()
        with pytest.raises(Unavailable, match=r"s3://tests/.*access denied.*credentials") as caught:
            call()
        assert "AKIASECRET" not in caught.value.message
        assert "\n" not in caught.value.message
        assert len(proxy.requests) == 1


def test_missing_credentials_are_reported_without_a_request(s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(Unavailable, match="no AWS credentials found; set AWS_PROFILE"):
        Reader().read("s3://tests/a")
    with pytest.raises(Unavailable, match="no AWS credentials found"):
        open_store("s3://tests/a")


def test_bucket_in_another_region_is_an_invalid_job(s3: Seaweed, proxy: FaultProxy) -> None:
    proxy.decide = lambda method, path: Reply(301, b"<Error><Code>PermanentRedirect</Code></Error>")
    with pytest.raises(InvalidJob, match="another region"):
        Reader(options_through(proxy)).read("s3://tests/a")


# --- every other protocol --------------------------------------------------------------------------------------------


def test_fsspec_protocol_is_listed_and_read(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a b", "a-b", "a/x", "p%2Fq", "h#"):
        memory.pipe(f"/any/{name}", name.encode())
    expected = [f"memory://any/{name}" for name in sorted(["a b", "a-b", "a/x", "p%2Fq", "h#"])]
    reader = Reader()
    assert uris_of(reader.list("memory://any")) == expected
    assert uris_of(reader.list("memory://any/", after=expected[1])) == expected[2:]
    assert uris_of(reader.list("memory://any", recursive=False)) == [uri for uri in expected if not uri.endswith("/x")]
    assert uris_of(reader.list("memory://absent")) == []
    for uri in expected:
        assert reader.read(uri).data == uri.removeprefix("memory://any/").encode()
        assert reader.stat(uri).size == len(uri.removeprefix("memory://any/"))
    with reader.open("memory://any/a b") as file:
        assert file.read() == b"a b"
    for call in (reader.read, reader.stat, reader.open):
        with pytest.raises(NotFound):
            call("memory://any/absent")
    with pytest.raises(NotFound):
        reader.stat("memory://any")


def test_files_inside_a_zip_archive_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("in/2.jpg", b"two")
        archive.writestr("in/1.jpg", b"one")
    found = uris_of(Reader().list(f"zip://in::file://{tmp_path}/images.zip"))
    assert found == [f"zip://in/{number}.jpg::file://{tmp_path}/images.zip" for number in (1, 2)]
    assert [blob.data for blob in Reader().read_many(found) if isinstance(blob, ObjectData)] == [b"one", b"two"]


def test_http_server_is_read(proxy: FaultProxy) -> None:
    pages = {"/images/a%20b.jpg?size=1": b"image", "/manifest.csv.gz": gzip.compress(b"uri\n1\n")}

    def decide(method: str, path: str) -> Reply:
        if path == "/throttled" and len(proxy.requests) < 3:
            return Reply(503)
        if path in ("/denied", "/broken"):
            return Reply({"/denied": 403, "/broken": 500}[path])
        page = pages.get(path, b"")
        found = {"content-length": str(len(page)), "etag": '"tag"'}
        return Reply(200, page, found) if path in pages or path == "/throttled" else Reply(404)

    proxy.decide = decide
    named = {proxy.endpoint: StorageOptions(private=True)}
    reader = Reader(named, retry_timeout=2)
    image = f"{proxy.endpoint}/images/a%20b.jpg?size=1"
    assert reader.read(image).data == b"image"
    assert (reader.stat(image).size, reader.stat(image).etag) == (5, "tag")
    assert reader.read(image, "tag").data == b"image"
    with pytest.raises(PreconditionFailed):
        reader.read(image, "another")
    with reader.open(f"{proxy.endpoint}/manifest.csv.gz") as file:
        assert gzip.decompress(file.read()) == b"uri\n1\n"
    with pytest.raises(NotFound):
        reader.read(f"{proxy.endpoint}/absent")
    with pytest.raises(AddressRefused, match="the host refuses it"):
        reader.read(f"{proxy.endpoint}/denied")
    with pytest.raises(Unavailable, match="does not answer"):
        Reader(named, retry_timeout=0.3).read(f"{proxy.endpoint}/broken")
    proxy.requests.clear()
    assert reader.read(f"{proxy.endpoint}/throttled").data == b""


def test_unknown_protocol_is_reported() -> None:
    with pytest.raises(InvalidJob, match="no reader for nosuch://"):
        Reader().read("nosuch://a/b")


def test_concurrent_first_reads_work(s3: Seaweed) -> None:
    uri = s3.bucket() + "a"
    s3.put(uri, b"1")
    reader, gate = Reader(), threading.Barrier(8)

    def read(_: int) -> bytes:
        gate.wait()
        return reader.read(uri).data

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [b"1"] * 8


def test_record_silence_tolerates_a_concurrent_answer() -> None:
    class InterruptedOutage(Outage):
        """An outage that ends each time its start is read, as if another thread had recorded an answer."""

        _begun: float | None

        @property
        def _since(self) -> float | None:
            since, self._begun = self._begun, None
            return since

        @_since.setter
        def _since(self, since: float | None) -> None:
            self._begun = since

    outage = InterruptedOutage(60.0, clock=lambda: 5.0)
    outage._since = 1.0
    outage.record_silence(Unavailable("away"), 2.0)
    assert outage._begun == 1.0


def test_reader_and_store_of_one_bucket_can_share_an_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    outage = Reader(outage_timeout=0.2).outage("s3://lake/in/a.png")
    store = pickle.loads(pickle.dumps(open_store("s3://lake/out", outage=0.2)))
    with pytest.raises(Unavailable):
        store.read("a")
    assert not outage.is_ongoing
    with pytest.raises(Unavailable):
        open_store("s3://lake/out", outage=outage).read("a")
    assert outage.is_ongoing
