"""The prefix source: what it lists, in which order, from where on, and what it leaves out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchjob.errors import InvalidJob
from batchjob.sources.glob_patterns import has_magic, make_path_filter, split_glob
from batchjob.sources.prefix import PrefixSource
from batchjob.sources.source import REF_FIELDS
from batchjob.storage.reader import Reader
from batchjob.types import Cursor
from tests.support.seaweed import Seaweed

READER = Reader()


def create_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def locations_of(batches: Iterator[pa.RecordBatch]) -> list[str]:
    return [uri for batch in batches for uri in batch.column("location").to_pylist()]


def list_names(source: PrefixSource, after: Cursor = Cursor(), excluded_folder: str | None = None) -> list[str]:  # noqa: B008
    """Return the listed locations, relative to the folder."""
    found = locations_of(source.refs(READER, after, excluded_folder))
    folder = split_glob(source.uri)[0] if has_magic(source.uri) else source.uri.rstrip("/") + "/"
    return [uri.removeprefix(folder) for uri in found]


def create_photos(folder: Path) -> Path:
    return create_files(
        folder / "photos",
        "a.jpg",
        "B.JPEG",
        "a/x.png",
        "a-b/y.webp",
        "a/deep/er/z.tiff",
        "notes.txt",
        ".DS_Store",
        "_SUCCESS",
        "a/_SUCCESS",
        "é.jpg",
        "with space.bmp",
    )


class TestListing:
    def test_images_are_listed_in_the_byte_order_of_their_keys(self, tmp_path: Path) -> None:
        folder = create_photos(tmp_path)

        batches = list(PrefixSource(uri=str(folder)).refs(READER, Cursor()))

        expected = ["B.JPEG", "a-b/y.webp", "a.jpg", "a/deep/er/z.tiff", "a/x.png", "with space.bmp", "é.jpg"]
        assert expected == sorted(expected, key=str.encode)
        (batch,) = batches
        assert batch.schema.equals(pa.schema(REF_FIELDS))
        assert batch.column("uri").to_pylist() == [f"{folder}/{name}" for name in expected]
        assert batch.column("location").equals(batch.column("uri"))
        assert batch.column("size").to_pylist() == [len(name.encode()) for name in expected]
        assert None not in batch.column("etag").to_pylist()

    @pytest.mark.parametrize("spelled", ["{}", "{}/", "file://{}"])
    def test_folder_may_be_spelled_in_three_ways(self, tmp_path: Path, spelled: str) -> None:
        folder = create_photos(tmp_path)
        found = locations_of(PrefixSource(uri=spelled.format(folder)).refs(READER, Cursor()))
        assert len(found) == 7
        assert all(uri.startswith(f"{folder}/") for uri in found)

    def test_non_recursive_listing_stays_in_the_folder(self, tmp_path: Path) -> None:
        source = PrefixSource(uri=str(create_photos(tmp_path)), recursive=False)
        assert list_names(source) == ["B.JPEG", "a.jpg", "with space.bmp", "é.jpg"]

    @pytest.mark.parametrize("extensions", [["png", ".WebP"], (".PNG", "webp")])
    def test_extensions_ignore_dot_and_case(self, tmp_path: Path, extensions: list[str]) -> None:
        assert list_names(PrefixSource(uri=str(create_photos(tmp_path)), extensions=extensions)) == [
            "a-b/y.webp",
            "a/x.png",
        ]

    def test_all_extensions_exclude_the_required_marker(self, tmp_path: Path) -> None:
        folder = create_photos(tmp_path)
        everything = list_names(PrefixSource(uri=str(folder), extensions="all"))
        marked = PrefixSource(uri=str(folder), extensions="all", require={"marker": "_SUCCESS"})
        assert len(everything) == 10
        assert set(everything) - set(list_names(marked)) == {"_SUCCESS"}

    def test_single_file_is_listed_if_its_extension_matches(self, tmp_path: Path) -> None:
        folder = create_photos(tmp_path)
        assert locations_of(PrefixSource(uri=f"{folder}/a/x.png").refs(READER, Cursor())) == [f"{folder}/a/x.png"]
        assert locations_of(PrefixSource(uri=f"{folder}/notes.txt").refs(READER, Cursor())) == []
        after = Cursor(1, f"{folder}/a/x.png")
        assert locations_of(PrefixSource(uri=f"{folder}/a/x.png").refs(READER, after)) == []

    def test_empty_listing_is_one_empty_batch(self, tmp_path: Path) -> None:
        tmp_path.joinpath("empty").mkdir()
        (batch,) = PrefixSource(uri=str(tmp_path / "empty")).refs(READER, Cursor())
        assert batch.num_rows == 0
        assert batch.schema.equals(pa.schema(REF_FIELDS))

    def test_listing_has_no_fields_and_no_version(self, tmp_path: Path) -> None:
        source = PrefixSource(uri=str(create_photos(tmp_path)))
        assert source.fields(READER) == []
        assert source.version(READER) is None
        assert source.explain_missing(READER) is None
        source.check(READER)

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
    def test_name_that_is_not_utf8_is_listed_once_and_read(self, tmp_path: Path) -> None:
        names = [b"a%FF.jpg", b"a.jpg", b"a\\udcff.jpg", b"a\xff.jpg", b"a\xffb%.jpg", b"b.jpg", b"c\xe9/\xc3\xa9.jpg"]
        for name in names:
            path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(name)
        source = PrefixSource(uri=str(tmp_path))
        found = locations_of(source.refs(READER, Cursor()))
        plain = [f"{tmp_path}/{name}" for name in ("a%FF.jpg", "a.jpg", "a\\udcff.jpg", "b.jpg")]
        encoded = [f"file://{tmp_path}/{name}" for name in ("a%FF.jpg", "a%FFb%25.jpg", "c%E9/%C3%A9.jpg")]
        assert found == [*plain[:3], *encoded[:2], plain[3], encoded[2]]
        assert [READER.read(location).data for location in found] == names
        for count, location in enumerate(found, 1):
            assert locations_of(source.refs(READER, Cursor(count, location))) == found[count:]
            assert locations_of(PrefixSource(uri=location).refs(READER, Cursor())) == [location]

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
    def test_plan_of_version_0_1_goes_on_after_a_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        for name in (b"a\xff.jpg", b"a\xffb.jpg", b"b.jpg"):
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
        after = Cursor(1, f"{tmp_path}/a\\udcff.jpg")
        found = locations_of(PrefixSource(uri=str(tmp_path)).refs(READER, after))
        assert found == [f"file://{tmp_path}/a%FFb.jpg", f"{tmp_path}/b.jpg"]


class TestGlobs:
    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("*.jpg", ["a.jpg", "é.jpg"]),
            ("*", ["B.JPEG", "a.jpg", "with space.bmp", "é.jpg"]),
            ("?.jpg", ["a.jpg", "é.jpg"]),
            ("[a-c].jpg", ["a.jpg"]),
            ("[!a].jpg", ["é.jpg"]),
            ("a*/*", ["a-b/y.webp", "a/x.png"]),
            ("a*/", ["a-b/y.webp", "a/deep/er/z.tiff", "a/x.png"]),
            ("a-*/", ["a-b/y.webp"]),
            ("a-b*/*.webp", ["a-b/y.webp"]),
            ("**/*.tiff", ["a/deep/er/z.tiff"]),
            ("**/[axy].*", ["a-b/y.webp", "a.jpg", "a/x.png"]),
            ("a/**", ["a/deep/er/z.tiff", "a/x.png"]),
            ("**", ["B.JPEG", "a-b/y.webp", "a.jpg", "a/deep/er/z.tiff", "a/x.png", "with space.bmp", "é.jpg"]),
            ("zz*", []),
        ],
    )
    def test_glob_lists_matching_files_and_resumes(self, tmp_path: Path, pattern: str, expected: list[str]) -> None:
        folder = create_photos(tmp_path)
        found = locations_of(PrefixSource(uri=f"{folder}/{pattern}").refs(READER, Cursor()))
        assert [uri.removeprefix(f"{folder}/") for uri in found] == expected
        for count, uri in enumerate(found, 1):
            resumed = locations_of(PrefixSource(uri=f"{folder}/{pattern}").refs(READER, Cursor(count, uri)))
            assert resumed == found[count:]

    def test_existing_name_with_brackets_is_not_a_glob(self, tmp_path: Path) -> None:
        folder = create_files(tmp_path / "run[1]", "a.jpg")
        assert locations_of(PrefixSource(uri=str(folder)).refs(READER, Cursor())) == [f"{folder}/a.jpg"]

    @pytest.mark.parametrize(
        ("include", "exclude", "expected"),
        [
            (["a/"], [], ["a/deep/er/z.tiff", "a/x.png"]),
            (["a"], [], ["a/deep/er/z.tiff", "a/x.png"]),
            (["er"], [], ["a/deep/er/z.tiff"]),
            (["*.jpg", "*.png"], [], ["a.jpg", "a/x.png", "é.jpg"]),
            (["a/*.png"], [], ["a/x.png"]),
            (["/a/*.png"], [], ["a/x.png"]),
            (["a/*"], [], ["a/deep/er/z.tiff", "a/x.png"]),
            (["a*/**"], ["deep/"], ["a-b/y.webp", "a/x.png"]),
            ([], ["a/", "*.jpg", "[B-C]*"], ["a-b/y.webp", "with space.bmp"]),
            ([], ["deep/*.tiff", "x.png", "?.jpg"], ["B.JPEG", "a-b/y.webp", "a/deep/er/z.tiff", "with space.bmp"]),
            (["nothing"], [], []),
        ],
    )
    def test_include_and_exclude_filter_paths(
        self, tmp_path: Path, include: list[str], exclude: list[str], expected: list[str]
    ) -> None:
        assert list_names(PrefixSource(uri=str(create_photos(tmp_path)), include=include, exclude=exclude)) == expected

    @given(st.text(alphabet="ab*?[]!-^&~|\\./", max_size=8), st.text(alphabet="ab[]!-^&~|\\./", max_size=8))
    def test_any_pattern_is_refused_or_compiles(self, pattern: str, path: str) -> None:
        refusable = not pattern.strip("/") or "-" in pattern  # an empty one, or a range that may run backwards
        with suppress(*[InvalidJob][:refusable]):
            make_path_filter(PrefixSource(uri="photos", include=[pattern]).include, ())(path)

    @given(st.text(alphabet="ab[]!-^&~|\\.*?", min_size=1, max_size=8))
    def test_escaped_magic_matches_only_itself(self, name: str) -> None:
        pattern = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
        chosen = make_path_filter((pattern,), ())
        assert chosen(name)
        assert not chosen(name + "x")


class TestResuming:
    def test_refs_resume_after_any_row(self, tmp_path: Path) -> None:
        source = PrefixSource(uri=str(create_photos(tmp_path)))
        whole = list_names(source)
        for count, name in enumerate(whole, 1):
            assert list_names(source, Cursor(count, f"{source.uri}/{name}")) == whole[count:]

    def test_large_folder_is_listed_in_bounded_batches(self, tmp_path: Path) -> None:
        for number in range(9000):
            tmp_path.joinpath(f"{number:05d}.jpg").touch()
        batches = list(PrefixSource(uri=str(tmp_path)).refs(READER, Cursor()))
        assert [batch.num_rows for batch in batches] == [8192, 808]
        assert locations_of(iter(batches)) == [f"{tmp_path}/{number:05d}.jpg" for number in range(9000)]


class TestExcludedFolder:
    @pytest.mark.parametrize("uri", ["", "/", "/**", "/*/**"])
    def test_excluded_folder_below_the_input_is_left_out(self, tmp_path: Path, uri: str) -> None:
        create_files(tmp_path, "a/x.jpg", "out/_batchjob/y.jpg", "out2/z.jpg")
        found = locations_of(
            PrefixSource(uri=f"{tmp_path}{uri}").refs(READER, Cursor(), excluded_folder=str(tmp_path / "out"))
        )
        assert found == [f"{tmp_path}/a/x.jpg", f"{tmp_path}/out2/z.jpg"]

    def test_excluded_folder_is_found_through_a_link(self, tmp_path: Path) -> None:
        real = create_files(tmp_path / "real", "a.jpg", "out/y.jpg")
        tmp_path.joinpath("link").symlink_to(real)
        source = PrefixSource(uri=f"{tmp_path}/link")
        assert list_names(source, excluded_folder=f"file://{real}/out/") == ["a.jpg"]

    @pytest.mark.parametrize("out", ["", "/photos", "/photos/"])
    def test_input_in_the_excluded_folder_is_refused(self, tmp_path: Path, out: str) -> None:
        source = PrefixSource(uri=f"{create_photos(tmp_path)}")
        with pytest.raises(InvalidJob, match=r"lies in the output .*; give output.uri a folder of its own"):
            locations_of(source.refs(READER, Cursor(), excluded_folder=f"{tmp_path}{out}"))

    def test_excluded_folder_elsewhere_is_ignored(self, tmp_path: Path) -> None:
        source = PrefixSource(uri=str(create_photos(tmp_path)))
        assert len(list_names(source, excluded_folder="s3://bucket/out")) == 7
        assert len(list_names(source, excluded_folder=f"{tmp_path}/out")) == 7


class TestErrors:
    @pytest.mark.parametrize("name", ["absent", "absent/", "absent.jpg", "absent/*.jpg"])
    def test_absent_input_is_reported(self, tmp_path: Path, name: str) -> None:
        source = PrefixSource(uri=f"{tmp_path}/{name}")
        for ask in (lambda: source.check(READER), lambda: locations_of(source.refs(READER, Cursor()))):
            with pytest.raises(InvalidJob, match=rf"input.uri {tmp_path}/absent.*: nothing there; check its spelling"):
                ask()

    def test_invalid_glob_is_reported(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidJob, match=r"\[z-a\].jpg: not a glob pattern"):
            locations_of(PrefixSource(uri=f"{tmp_path}/[z-a].jpg").refs(READER, Cursor()))

    def test_missing_requirements_are_explained(self, tmp_path: Path) -> None:
        source = PrefixSource(uri=f"{tmp_path}/photos", require={"marker": "_SUCCESS", "min_images": 3})
        assert source.explain_missing(READER) == f"input.uri {tmp_path}/photos: nothing there yet"
        create_files(tmp_path / "photos", "a.jpg")
        missing = f"input.require.marker: {tmp_path}/photos/_SUCCESS is not there yet"
        assert source.explain_missing(READER) == missing
        glob = PrefixSource(uri=f"{tmp_path}/photos/*.jpg", require={"marker": "_SUCCESS"})
        assert glob.explain_missing(READER) == missing
        create_files(tmp_path / "photos", "_SUCCESS")
        assert source.explain_missing(READER) is None
        assert glob.explain_missing(READER) is None

    def test_min_images_requires_the_folder(self, tmp_path: Path) -> None:
        uri = f"{tmp_path}/photos"
        assert (
            PrefixSource(uri=uri, require={"min_images": 1}).explain_missing(READER)
            == f"input.uri {uri}: nothing there yet"
        )
        assert PrefixSource(uri=uri, require={}).explain_missing(READER) is None

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"extensions": []}, "has 0 values; 1 is the least"),
            ({"extensions": [""]}, "write 'all' to take every file"),
            ({"include": [""]}, "empty pattern"),
            ({"exclude": ["[z-a]"]}, "is not a glob pattern"),
            ({"require": {"min_images": 0}}, "must be at least 1, not 0"),
            ({"require": {"marker": ""}}, "is empty"),
            ({"glob": "*"}, "glob: not a field of PrefixSource"),
        ],
    )
    def test_invalid_settings_are_refused(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(InvalidJob, match=message):
            PrefixSource(uri="photos", **settings)


class TestOnS3:
    def test_folder_file_and_resuming_on_s3(self, s3: Seaweed, tmp_path: Path) -> None:
        root = s3.bucket("sources")
        s3.put_tree(create_photos(tmp_path), root + "photos")
        s3.put(root + "photos2/other.jpg", b"x")
        names = ["B.JPEG", "a-b/y.webp", "a.jpg", "a/deep/er/z.tiff", "a/x.png", "with space.bmp", "é.jpg"]
        for uri in (f"{root}photos", f"{root}photos/"):
            source = PrefixSource(uri=uri)
            whole = locations_of(source.refs(READER, Cursor()))
            assert sorted(whole) == sorted(f"{root}photos/{name}" for name in names)
            for count, location in enumerate(whole, 1):
                assert locations_of(source.refs(READER, Cursor(count, location))) == whole[count:]
        (batch,) = PrefixSource(uri=f"{root}photos/a.jpg").refs(READER, Cursor())
        assert batch.column("location").to_pylist() == [f"{root}photos/a.jpg"]
        assert batch.column("size").to_pylist() == [5]
        assert '"' not in batch.column("etag")[0].as_py()

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("*.jpg", ["a.jpg", "é.jpg"]),
            ("a-*/*", ["a-b/y.webp"]),
            ("a*/*", ["a-b/y.webp", "a/x.png"]),
            ("a*", ["a.jpg"]),
            ("wi*", ["with space.bmp"]),
            ("**/*.tiff", ["a/deep/er/z.tiff"]),
        ],
    )
    def test_glob_on_s3(self, s3: Seaweed, tmp_path: Path, pattern: str, expected: list[str]) -> None:
        root = s3.bucket("sources")
        s3.put_tree(create_photos(tmp_path), root + "photos")
        found = locations_of(PrefixSource(uri=f"{root}photos/{pattern}").refs(READER, Cursor()))
        assert sorted(found) == sorted(f"{root}photos/{name}" for name in expected)
        for count, location in enumerate(found, 1):
            resumed = locations_of(PrefixSource(uri=f"{root}photos/{pattern}").refs(READER, Cursor(count, location)))
            assert resumed == found[count:]

    def test_marker_and_excluded_folder_on_s3(self, s3: Seaweed) -> None:
        root = s3.bucket("sources")
        source = PrefixSource(uri=f"{root}in", require={"marker": "_SUCCESS"})
        assert source.explain_missing(READER) == f"input.uri {root}in: nothing there yet"
        with pytest.raises(InvalidJob, match="nothing there"):
            source.check(READER)
        s3.put(f"{root}in/a.jpg", b"x")
        s3.put(f"{root}in/out/b.jpg", b"x")
        s3.put(f"{root}in/empty/", b"")
        assert source.explain_missing(READER) == f"input.require.marker: {root}in/_SUCCESS is not there yet"
        s3.put(f"{root}in/_SUCCESS", b"")
        assert source.explain_missing(READER) is None
        assert locations_of(source.refs(READER, Cursor(), excluded_folder=f"{root}in/out")) == [f"{root}in/a.jpg"]
        with pytest.raises(InvalidJob, match="lies in the output"):
            locations_of(source.refs(READER, Cursor(), excluded_folder=root))


def test_sample_photographs_are_listed(test_data: Path) -> None:
    folder = test_data / "imagenet-sample"
    found = locations_of(PrefixSource(uri=str(folder)).refs(READER, Cursor()))
    assert found == sorted(map(str, folder.rglob("*.JPEG")), key=str.encode)
    assert len(found) == 300
