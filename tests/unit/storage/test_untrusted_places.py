"""Places that an untrusted manifest may name: files that are none, files without an end, places outside of `within`."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

from batchjob.errors import AddressRefused, InvalidJob, ObjectTooLarge, Unavailable
from batchjob.loader.fetch import Fetcher
from batchjob.sources.manifest import ManifestSource
from batchjob.storage.client_errors import translate_errors
from batchjob.storage.objects import ObjectData
from batchjob.storage.reader import Reader
from batchjob.types import Cursor, ErrorRecord, ImageRef
from batchjob.uris import is_within

LIMIT = 1 << 20


def fetch(*uris: str, within: tuple[str, ...] = ()) -> list[ObjectData | ErrorRecord]:
    refs = [ImageRef(position, uri, uri) for position, uri in enumerate(uris)]
    return Fetcher(Reader(retry_timeout=0.0, within=within), LIMIT, retries=0).fetch(refs)


@pytest.fixture
def fine(tmp_path: Path) -> str:
    (tmp_path / "fine.png").write_bytes(b"fine")
    return str(tmp_path / "fine.png")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "path",
    ["/proc/self/pagemap", "/proc/self/mem", "/proc/kmsg", "/proc/kcore", "/proc/sysrq-trigger", "/proc/self/environ"],
)
def test_files_that_say_they_are_empty_are_read_in_bounds(fine: str, path: str) -> None:
    started = time.monotonic()
    good, answer = fetch(fine, path)
    assert time.monotonic() - started < 5
    assert isinstance(good, ObjectData)
    assert isinstance(answer, ErrorRecord) or len(answer.data) <= LIMIT


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs /proc")
def test_size_counts_although_the_file_says_it_has_none() -> None:
    (answer,) = Reader(retry_timeout=0.0).read_many(["/proc/self/pagemap"], limit=1000)
    assert isinstance(answer, ObjectTooLarge)


def test_pipes_sockets_devices_and_folders_are_error_rows(fine: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{short}/s.png")
        places = [tmp_path / "pipe.png", Path(short) / "s.png", tmp_path, Path("/dev/zero"), Path("/dev/tty")]
        good, *answers = fetch(fine, *map(str, places), *(path.as_uri() for path in places))
    assert isinstance(good, ObjectData)
    assert [answer.type for answer in answers if isinstance(answer, ErrorRecord)] == ["not_found"] * 10


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "/".join(["y" * 200] * 30), "nul\0.png"])
def test_impossible_names_are_error_rows(fine: str, tmp_path: Path, name: str) -> None:
    good, *answers = fetch(fine, f"{tmp_path}/{name}", f"file://{tmp_path}/{name}")
    assert isinstance(good, ObjectData)
    for answer in answers:
        assert isinstance(answer, ErrorRecord)
        assert answer.type in ("unaddressable", "not_found")


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """Folder with `in/` and `secret/`, and links from one to the other."""
    for name in ("in/a b.png", "in/deep/b.png", "in2/c.png", "secret/key.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "in/link.png").symlink_to(tmp_path / "secret/key.png")
    (tmp_path / "in/folder").symlink_to(tmp_path / "secret")
    (tmp_path / "alias").symlink_to(tmp_path / "in")
    for folder in ("in", "secret"):
        with zipfile.ZipFile(tmp_path / folder / "x.zip", "w") as archive:
            archive.writestr("z.png", "zip")
    return tmp_path


@pytest.mark.parametrize("within", ["in", "in/", "alias"])
def test_local_rows_are_read_within_the_folder_only(lake: Path, within: str) -> None:
    inside = ["in/a b.png", "in/deep/../deep/b.png", "alias/deep/b.png"]
    outside = ["in/../secret/key.png", "in/link.png", "in/folder/key.png", "in2/c.png", "/etc/hostname"]
    prefix = (f"{lake}/{within}",)
    for name in inside:
        (answer,) = fetch(f"{lake}/{name}", within=prefix)
        assert isinstance(answer, ObjectData), name
    answers = fetch((lake / "in/a b.png").as_uri(), f"zip://z.png::{lake}/in/x.zip", within=prefix)
    assert all(isinstance(answer, ObjectData) for answer in answers)
    rows = fetch(
        *(os.path.join(lake, name) for name in outside),  # noqa: PTH118 - keeps `..`
        f"file://{lake}/in/..%2Fsecret/key.png",
        f"zip://z.png::{lake}/secret/x.zip",
        f"zip://z.png::file://{lake}/in/../secret/x.zip",
        f"local://{lake}/secret/key.png",
        within=prefix,
    )
    assert [(row.stage, row.type) for row in rows if isinstance(row, ErrorRecord)] == [("fetch", "refused")] * 9


@pytest.mark.parametrize(
    ("uri", "inside"),
    [
        ("s3://lake/in/a.png", True),
        ("s3a://lake/in/a%2e%2e.png", True),
        ("s3://lake/in2/a.png", False),
        ("s3://lake/in/../secret/a.png", False),
        ("s3://other/in/a.png", False),
        ("gs://lake/in/a.png", False),
        ("/lake/in/a.png", False),
        ("https://images.example.com/in/a.png", True),
        ("https://images.example.com/in/%2e%2e/a.png", False),
        ("https://images.example.com.evil.org/in/a.png", False),
        ("zip://a.png::s3://lake/in/x.zip", True),
        ("zip://a.png::s3://lake/x.zip", False),
    ],
)
def test_prefixes_of_buckets_and_hosts_hold(uri: str, inside: bool) -> None:
    assert is_within(uri, ("s3://lake/in/", "https://images.example.com/in")) is inside


def test_limit_travels_with_the_reader(lake: Path) -> None:
    reader = pickle.loads(pickle.dumps(Reader(within=(f"{lake}/in",))))
    (answer,) = reader.read_many([f"{lake}/secret/key.png"])
    assert isinstance(answer, AddressRefused)


def test_manifest_rows_outside_are_error_rows_of_their_own(lake: Path) -> None:
    (lake / "m.csv").write_text("path\nin/a b.png\n../../../etc/hostname\nsecret/key.png\n")
    fields = {"uri": "m.csv", "uri_column": "path", "within": "in"}
    source = ManifestSource.model_validate(fields, context={"base": lake})
    assert source.prefixes == (f"{lake}/in",)
    assert ManifestSource.model_validate(fields | {"within": None}, context={"base": lake}).prefixes == ()
    several = ManifestSource.model_validate(fields | {"within": ["in", "s3://lake/in"]}, context={"base": lake})
    assert several.prefixes == (f"{lake}/in", "s3://lake/in")
    (batch,) = source.refs(Reader(), Cursor())
    answers = fetch(*batch.column("location").to_pylist(), within=source.prefixes)
    assert [getattr(answer, "type", None) for answer in answers] == [None, "refused", "refused"]


def test_folder_that_is_not_there_is_an_error_of_the_job(lake: Path) -> None:
    (lake / "m.csv").write_text("path\nin/a b.png\n")
    source = ManifestSource(uri=f"{lake}/m.csv", uri_column="path", within=(f"{lake}/in", f"{lake}/inn"))
    with pytest.raises(InvalidJob, match=r"input.within: .*/inn is not there"):
        source.check(Reader())


def test_space_around_an_absent_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.png ").write_bytes(b"a")
    padded, plain, present = fetch(f"{tmp_path}/b.png ", f"{tmp_path}/b.png", f"{tmp_path}/a.png ")
    assert isinstance(padded, ErrorRecord)
    assert padded.message.endswith("a space begins or ends its name")
    assert isinstance(plain, ErrorRecord)
    assert "a space" not in plain.message
    assert isinstance(present, ObjectData)


def test_client_without_its_library_is_no_outage() -> None:
    with pytest.raises(InvalidJob, match="lacks a library"), translate_errors("hdfs://name-node/x"):
        raise OSError("Unable to load libjvm: /usr/lib/libjvm.so: cannot open shared object file")
    with pytest.raises(Unavailable), translate_errors("hdfs://name-node/x"):
        raise OSError("connection reset")
