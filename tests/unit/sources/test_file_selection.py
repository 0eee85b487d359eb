"""Files that a listing takes: hidden names, folders that are left out before they are entered, folders that fail."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchjob.errors import InvalidJob
from batchjob.sources.glob_patterns import make_folder_filter
from batchjob.sources.prefix import PrefixSource
from batchjob.sources.skipped_files import SkippedFiles
from batchjob.storage.reader import Reader
from batchjob.types import Cursor
from tests.support.seaweed import Seaweed

READER = Reader()
HIDDEN = [
    "._a.jpg",
    ".ipynb_checkpoints/a-checkpoint.jpg",
    ".thumbs/._b.jpg",
    ".thumbs/b.jpg",
    ".thumbs/deep/c.jpg",
    "__MACOSX/._a.jpg",
    "sub/.Trash-1000/files/old.jpg",
    "sub/.hidden.png",
]
PLAIN = ["a.jpg", "sub/__MACOSX.jpg", "sub/b.c.png", "x..y/d.jpg"]


def create_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def list_names(uri: str, skipped: SkippedFiles | None = None, **settings: Any) -> list[str]:
    """Return the names in the folder of the images that are taken, after checking that any of them can be resumed."""
    source = PrefixSource(uri=uri, **settings)

    def listed(after: Cursor, skipped: SkippedFiles | None = None) -> list[str]:
        batches = source.refs(READER, after, skipped=skipped)
        return [location for batch in batches for location in batch.column("location").to_pylist()]

    found = listed(Cursor(), skipped)
    for count, location in enumerate(found, 1):
        assert listed(Cursor(count, location)) == found[count:]
    return [location.split("/in/", 1)[1].partition("::")[0] for location in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return create_files(tmp_path / "in", *HIDDEN, *PLAIN)


class TestHiddenNames:
    @pytest.fixture(params=["disk", "s3", "zip"])
    def uri(self, request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
        if request.param == "disk":
            yield f"{folder}/"
        elif request.param == "s3":
            s3: Seaweed = request.getfixturevalue("s3")
            root = s3.bucket("sources")
            s3.put_tree(folder, f"{root}in")
            yield f"{root}in/"
        else:
            with zipfile.ZipFile(folder.parent / "a.zip", "w") as archive:
                for name in HIDDEN + PLAIN:
                    archive.write(folder / name, f"in/{name}")
            yield f"zip://in/::file://{folder.parent}/a.zip"

    def test_hidden_names_are_skipped_and_counted(self, uri: str) -> None:
        skipped = SkippedFiles()
        assert sorted(list_names(uri, skipped)) == PLAIN
        assert skipped.describe() == ["2 hidden files and 4 hidden folders skipped; input.hidden: true takes them"]

    def test_hidden_names_are_taken_where_asked_for(self, uri: str) -> None:
        assert sorted(list_names(uri, hidden=True)) == sorted(HIDDEN + PLAIN)
        assert sorted(list_names(uri, hidden=True, exclude=[".*", "__MACOSX/"])) == PLAIN

    @pytest.mark.parametrize(
        ("include", "expected"),
        [
            (["*.jpg"], ["a.jpg", "sub/__MACOSX.jpg", "x..y/d.jpg"]),
            ([".thumbs/"], [".thumbs/b.jpg", ".thumbs/deep/c.jpg"]),
            ([".thumbs/*.jpg"], [".thumbs/b.jpg"]),
            ([".thumbs/._*"], [".thumbs/._b.jpg"]),
            (["*.c.png", "**/.T*/**/*.jpg"], ["sub/.Trash-1000/files/old.jpg", "sub/b.c.png"]),
            (["._a.jpg"], ["._a.jpg"]),
            (["__MACOSX/._*"], ["__MACOSX/._a.jpg"]),
            ([".*.png"], ["sub/.hidden.png"]),
        ],
    )
    def test_include_takes_hidden_names_that_it_names(self, uri: str, include: list[str], expected: list[str]) -> None:
        assert sorted(list_names(uri, include=include)) == sorted(expected)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("**", PLAIN),
        (".*.jpg", ["._a.jpg"]),
        ("*/.hidden.*", ["sub/.hidden.png"]),
        (".th*/", [".thumbs/b.jpg", ".thumbs/deep/c.jpg"]),
        (".thumbs/*/*", [".thumbs/deep/c.jpg"]),
        ("**/.thumbs/*", [".thumbs/b.jpg"]),
        ("._a.jpg", ["._a.jpg"]),
        (".thumbs", [".thumbs/b.jpg", ".thumbs/deep/c.jpg"]),
    ],
)
def test_uri_takes_hidden_names_that_it_names(folder: Path, pattern: str, expected: list[str]) -> None:
    assert list_names(f"{folder}/{pattern}") == expected


def test_hidden_folders_above_the_input_do_not_count(tmp_path: Path) -> None:
    create_files(tmp_path / ".cache/in", "a.jpg", ".b.jpg")
    assert list_names(f"{tmp_path}/.cache/in") == ["a.jpg"]


def test_files_of_other_extensions_are_counted(tmp_path: Path) -> None:
    names = [f"{number}.txt" for number in range(7)] + ["a.JSON", "b/c.json", "Makefile", "d.jpg", "left.md"]
    create_files(tmp_path / "in", *names)
    skipped = SkippedFiles()
    assert list_names(f"{tmp_path}/in", skipped, exclude=["*.md"]) == ["d.jpg"]
    assert skipped.describe() == ["10 files skipped by extension: .txt (7), .json (2), none (1)"]


def test_many_extensions_are_cut_to_five() -> None:
    skipped = SkippedFiles()
    for number in range(8):
        skipped.add_extension(f"a.e{number}")
    (line,) = skipped.describe()
    assert line == "8 files skipped by extension: .e0 (1), .e1 (1), .e2 (1), .e3 (1), .e4 (1), 3 more"


def test_files_with_an_extension_each_are_counted_in_bounded_memory() -> None:
    skipped = SkippedFiles()
    for number in range(5000):
        skipped.add_extension(f"scans/scan.{number:07}")
    (line,) = skipped.describe()
    assert line.startswith("5,000 files skipped by extension: .0000000 (1), ")
    assert line.endswith(", over 995 more")
    assert len(skipped.extensions) == 1000


class RecordingReader(Reader):
    """A reader that keeps from where each listing began."""

    def __init__(self) -> None:
        super().__init__()
        self.listings: list[str | None] = []

    def list(self, uri: str, after: str | None = None, recursive: bool = True, folders: Any = None) -> Any:
        self.listings.append(after)
        return super().list(uri, after, recursive, folders)


def test_listing_of_a_bucket_jumps_over_a_large_excluded_folder(s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.sources.locations.LIST_PAGE_SIZE", 3)
    root = s3.bucket("sources")
    names = ["a.jpg", *(f"old/{number}.jpg" for number in range(9)), "old/\U0001f600.jpg", "olda.jpg", "z/b.jpg"]
    for name in names:
        s3.put(f"{root}in/{name}", b"x")
    reader = RecordingReader()
    source = PrefixSource(uri=f"{root}in/", exclude=["old/"])
    batches = list(source.refs(reader, Cursor()))
    found = [location for batch in batches for location in batch.column("location").to_pylist()]
    assert found == [f"{root}in/{name}" for name in ("a.jpg", "olda.jpg", "z/b.jpg")]
    assert reader.listings[-2:] == [None, f"{root}in/old/\ufffd"]


@pytest.mark.parametrize(
    ("glob", "entered", "left_out"),
    [
        ("*/x/*.jpg", ["a/", "a/x/"], ["a/y/", "a/x/deep/"]),
        ("a*/", ["ab/", "ab/x/"], ["b/"]),
        ("a/**/*.jpg", ["a/", "a/b/c/"], ["b/"]),
        ("**", ["a/", "a/b/"], []),
        ("*.jpg", [], ["a/"]),
        ("x[a/b]y/*.jpg", ["b/"], []),
    ],
)
def test_globs_enter_only_folders_with_possible_matches(glob: str, entered: list[str], left_out: list[str]) -> None:
    may_hold = make_folder_filter(glob)
    assert [folder for folder in entered + left_out if may_hold(folder)] == entered


class TestUnreadableFolders:
    """The disk refuses a folder; as root reads every folder, the refusal is made by a scandir of our own."""

    @pytest.fixture
    def uri(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        create_files(tmp_path / "in", "a.jpg", "lost+found/b.jpg", "private[1]/c.jpg", "z/d.jpg")
        scandir = os.scandir

        def refuse(path: Any = ".") -> Any:
            if os.fsencode(path).rstrip(b"/").endswith((b"lost+found", b"private[1]", b"/z/shut")):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        return f"{tmp_path}/in/"

    def test_unreadable_folder_is_an_error_that_names_exclude(self, uri: str) -> None:
        with pytest.raises(InvalidJob) as caught:
            list_names(uri)
        assert caught.value.message == (
            f"input.uri: {uri}private[1]/ cannot be listed (Permission denied); give this user access to it, or leave "
            "it out with input.exclude: ['private[[]1]/']"
        )

    @pytest.mark.parametrize("exclude", ["private[[]1]/", "private*", "/private?1?"])
    def test_excluded_folder_is_not_entered_and_lost_and_found_is_skipped(self, uri: str, exclude: str) -> None:
        skipped = SkippedFiles()
        assert list_names(uri, skipped, exclude=[exclude]) == ["a.jpg", "z/d.jpg"]
        assert skipped.describe() == [f"{uri}lost+found/ skipped: it may not be read"]

    def test_folders_that_a_glob_leaves_out_are_not_entered(self, uri: str) -> None:
        assert list_names(f"{uri}[a-z]/*.jpg") == ["z/d.jpg"]
        assert list_names(f"{uri}*.jpg") == ["a.jpg"]

    def test_input_that_may_not_be_read_is_an_error(self, uri: str) -> None:
        create_files(Path(uri) / "z/shut", "e.jpg")
        with pytest.raises(InvalidJob, match=r"input.uri \S+/z/shut cannot be listed \(Permission denied\); give"):
            list_names(f"{uri}z/shut")


def test_folder_with_too_long_a_path_is_an_error(tmp_path: Path) -> None:
    create_files(tmp_path / "in", "a.jpg")
    here = os.open(tmp_path / "in", os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 180, dir_fd=here)
        below = os.open("d" * 180, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    with pytest.raises(InvalidJob, match=r"a folder deep below .*/in/d{180}/ cannot be listed \(File name too long\)"):
        list_names(f"{tmp_path}/in")
    assert list_names(f"{tmp_path}/in", exclude=["d*"]) == ["a.jpg"]
