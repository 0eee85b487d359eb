"""Images inside zip and tar archives, at their root and below: listed, matched and read."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from batchjob.errors import InvalidJob, NotFound, StorageError
from batchjob.sources.prefix import PrefixSource
from batchjob.storage.objects import ObjectData
from batchjob.storage.reader import Reader
from batchjob.types import Cursor

NAMES = ["50%.png", "a b.png", "a%20b.png", "in/deep/y.png", "in/x.png", "notes.txt"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my archives")
    with zipfile.ZipFile(folder / "x.zip", "w") as zipped, tarfile.open(folder / "x.tar", "w") as tarred:
        for name in NAMES:
            path = folder / "src" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
            zipped.write(path, name)
            tarred.add(path, name)
    return folder


def list_images(uri: str) -> list[str]:
    batches = PrefixSource(uri=uri).refs(Reader(), Cursor())
    return [uri for batch in batches for uri in batch.column("location").to_pylist()]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    ("inner", "names"),
    [
        ("", ["50%.png", "a b.png", "a%20b.png", "in/deep/y.png", "in/x.png"]),
        ("in", ["in/deep/y.png", "in/x.png"]),
        ("in/", ["in/deep/y.png", "in/x.png"]),
        ("*.png", ["50%.png", "a b.png", "a%20b.png"]),
        ("in/*.png", ["in/x.png"]),
        ("a b.png", ["a b.png"]),
    ],
)
def test_members_are_listed_and_read(archives: Path, kind: str, inner: str, names: list[str]) -> None:
    for archive in (f"{archives}/x.{kind}", f"file://{archives}/x.{kind}"):
        found = list_images(f"{kind}://{inner}::{archive}")
        assert sorted(found) == [f"{kind}://{name}::{archive}" for name in names]
        answers = Reader().read_many(found)
        assert sorted(one.data.decode() for one in answers if isinstance(one, ObjectData)) == names


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_listing_of_an_archive_resumes(archives: Path, kind: str) -> None:
    uri = f"{kind}://::{archives}/x.{kind}"
    found = [one.uri for one in Reader().list(uri)]
    assert len(found) == len(NAMES)
    for at, after in enumerate(found):
        assert [one.uri for one in Reader().list(uri, after)] == found[at + 1 :]
    assert [one.uri for one in Reader().list(uri, recursive=False)] == [one for one in found if "in/" not in one]


def test_whole_memory_file_system_is_listed() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/archives-root/a.png", b"a")
    found = [one.uri for one in Reader().list("memory://")]
    assert "memory://archives-root/a.png" in found
    assert Reader().read("memory://archives-root/a.png").data == b"a"


def test_absent_and_damaged_archives_are_reported(archives: Path) -> None:
    (archives / "bad.zip").write_bytes(b"no archive")
    (archives / "bad.tar").write_bytes(b"no archive" * 100)
    for kind in ("zip", "tar"):
        with pytest.raises(NotFound):
            Reader().read(f"{kind}://a.png::{archives}/absent.{kind}")
        with pytest.raises(NotFound):
            Reader().read(f"{kind}://absent.png::{archives}/x.{kind}")
        # The archive's fault, which no retry mends.
        with pytest.raises(StorageError, match="archive"):
            Reader().read(f"{kind}://a.png::{archives}/bad.{kind}")
        with pytest.raises(InvalidJob, match="archive"):
            list_images(f"{kind}://::{archives}/bad.{kind}")
