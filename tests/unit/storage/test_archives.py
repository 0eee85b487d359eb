"""Images inside zip and tar archives, at their root and below: listed, matched and read."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from batchjob.errors import InvalidJob, NotFound, StorageError, UnaddressableKey
from batchjob.sources.manifest import ManifestSource
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


@pytest.mark.parametrize("ending", ["tgz", "tar.gz", "tbz2", "tar.bz2", "txz", "tar.xz"])
def test_compressed_tar_archives_are_read_by_their_ending(archives: Path, tmp_path: Path, ending: str) -> None:
    compression = {"g": "gz", "b": "bz2", "x": "xz"}[ending.removeprefix("tar.").removeprefix("t")[0]]
    path = tmp_path / f"X.{ending}"
    with tarfile.open(path, f"w:{compression}") as archive:  # type: ignore[call-overload]
        archive.add(archives / "src/in", "in")
    found = list_images(f"tar://::{path}")
    assert found == [f"tar://in/{name}::{path}" for name in ("deep/y.png", "x.png")]
    assert Reader().read(found[1]).data == b"in/x.png"


def test_archives_that_were_cut_off_are_refused(archives: Path, tmp_path: Path) -> None:
    whole = (archives / "x.tar").read_bytes()
    with tarfile.open(archives / "x.tar") as archive:
        members = [member.offset for member in archive]
    cut = tmp_path / "cut.tar"
    # Between two members, in a header, in the bytes of a member.
    for size in (members[2], members[2] + 100, members[2] + 515):
        cut.write_bytes(whole[:size])
        with pytest.raises(InvalidJob, match="archive"):
            list_images(f"tar://::{cut}")
    cut.write_bytes(whole[: members[2]] + b"?" * 512 + whole[members[2] + 512 :])
    with pytest.raises(InvalidJob, match="after 2 members"):
        list_images(f"tar://::{cut}")
    for compression in ("gz", "bz2", "xz"):
        packed = tmp_path / f"x.tar.{compression}"
        with tarfile.open(packed, f"w:{compression}") as archive:  # type: ignore[call-overload]
            archive.add(archives / "src", ".")
        packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
        with pytest.raises(InvalidJob, match="archive"):
            list_images(f"tar://::{packed}")


def test_members_of_a_packed_folder_have_two_names(archives: Path, tmp_path: Path) -> None:
    dotted = tmp_path / "dotted.tar"
    with tarfile.open(dotted, "w") as archive:
        archive.add(archives / "src", ".")
        archive.addfile(tarfile.TarInfo("./z.png"))
    for uri in (f"tar://in/x.png::{dotted}", f"tar://./in/x.png::{dotted}", f"tar://./in/x.png::{archives}/x.tar"):
        assert Reader().read(uri).data == b"in/x.png"
    found = list_images(f"tar://in/::{dotted}")
    assert found == [f"tar://in/{name}::{dotted}" for name in ("deep/y.png", "x.png")]
    assert all(Reader().read(uri).data for uri in found)


def test_encrypted_and_damaged_members_are_errors_at_once(archives: Path, tmp_path: Path) -> None:
    data = bytearray((archives / "x.zip").read_bytes())
    data[6] |= 1
    data[data.find(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("a.png", b"abc" * 1000)
    packed = (tmp_path / "bad.zip").read_bytes()
    (tmp_path / "bad.zip").write_bytes(packed[:35] + b"\xff" * 4 + packed[39:])  # behind the header and the name
    with pytest.raises(UnaddressableKey, match="encrypted"):
        Reader().read(f"zip://50%.png::{tmp_path}/locked.zip")
    with pytest.raises(UnaddressableKey, match="archive"):
        Reader().read(f"zip://a.png::{tmp_path}/bad.zip")


def test_manifest_in_an_archive_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped, tarfile.open(tmp_path / "x.tar", "w") as tarred:
        (tmp_path / "m.csv").write_text("path\nin/a.png\nin/b.png\n")
        zipped.write(tmp_path / "m.csv", "m.csv")
        tarred.add(tmp_path / "m.csv", "m.csv")
    for kind in ("zip", "tar"):
        source = ManifestSource(uri=f"{kind}://m.csv::{tmp_path}/x.{kind}", uri_column="path")
        assert [uri for batch in source.refs(Reader(), Cursor()) for uri in batch["uri"].to_pylist()] == [
            "in/a.png",
            "in/b.png",
        ]


def test_archive_without_its_link_is_explained(archives: Path) -> None:
    for kind in ("zip", "tar"):
        with pytest.raises(InvalidJob, match=f"write {kind}://::{archives}/x.{kind}"):
            list_images(f"{kind}://{archives}/x.{kind}")
