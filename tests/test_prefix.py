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
from pydantic import ValidationError
from seaweed import Seaweed

from batchjob.errors import InvalidJob
from batchjob.sources.glob_patterns import has_magic, make_path_filter, split_glob
from batchjob.sources.prefix import PrefixSource
from batchjob.sources.source import REF_FIELDS
from batchjob.storage.reader import Reader
from batchjob.types import Cursor

READER = Reader()


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def uris(batches: Iterator[pa.RecordBatch]) -> list[str]:
    return [uri for batch in batches for uri in batch.column("location").to_pylist()]


def listed(source: PrefixSource, after: Cursor = Cursor(), outside: str | None = None) -> list[str]:  # noqa: B008
    """Locations, relative to the folder."""
    found = uris(source.refs(READER, after, outside))
    folder = split_glob(source.uri)[0] if has_magic(source.uri) else source.uri.rstrip("/") + "/"
    return [uri.removeprefix(folder) for uri in found]


def photos(folder: Path) -> Path:
    return tree(
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


class TestWhatIsListed:
    def test_images_in_the_byte_order_of_their_keys(self, tmp_path: Path) -> None:
        folder = photos(tmp_path)

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
    def test_folder_in_each_spelling(self, tmp_path: Path, spelled: str) -> None:
        folder = photos(tmp_path)
        found = uris(PrefixSource(uri=spelled.format(folder)).refs(READER, Cursor()))
        assert len(found) == 7
        assert all(uri.startswith(f"{folder}/") for uri in found)

    def test_not_recursive(self, tmp_path: Path) -> None:
        source = PrefixSource(uri=str(photos(tmp_path)), recursive=False)
        assert listed(source) == ["B.JPEG", "a.jpg", "with space.bmp", "é.jpg"]

    @pytest.mark.parametrize("extensions", [["png", ".WebP"], (".PNG", "webp")])
    def test_extensions_with_and_without_dot_in_any_case(self, tmp_path: Path, extensions: list[str]) -> None:
        assert listed(PrefixSource(uri=str(photos(tmp_path)), extensions=extensions)) == ["a-b/y.webp", "a/x.png"]

    def test_all_extensions_but_the_required_marker(self, tmp_path: Path) -> None:
        folder = photos(tmp_path)
        everything = listed(PrefixSource(uri=str(folder), extensions="all"))
        marked = PrefixSource(uri=str(folder), extensions="all", require={"marker": "_SUCCESS"})
        assert len(everything) == 11
        assert set(everything) - set(listed(marked)) == {"_SUCCESS"}

    def test_one_file_whatever_it_is_called_if_its_extension_fits(self, tmp_path: Path) -> None:
        folder = photos(tmp_path)
        assert uris(PrefixSource(uri=f"{folder}/a/x.png").refs(READER, Cursor())) == [f"{folder}/a/x.png"]
        assert uris(PrefixSource(uri=f"{folder}/notes.txt").refs(READER, Cursor())) == []
        after = Cursor(1, f"{folder}/a/x.png")
        assert uris(PrefixSource(uri=f"{folder}/a/x.png").refs(READER, after)) == []

    def test_nothing_that_fits_is_one_empty_batch(self, tmp_path: Path) -> None:
        tmp_path.joinpath("empty").mkdir()
        (batch,) = PrefixSource(uri=str(tmp_path / "empty")).refs(READER, Cursor())
        assert batch.num_rows == 0
        assert batch.schema.equals(pa.schema(REF_FIELDS))

    def test_no_fields_and_no_version(self, tmp_path: Path) -> None:
        source = PrefixSource(uri=str(photos(tmp_path)))
        assert source.fields(READER) == []
        assert source.version(READER) is None
        assert source.explain_missing(READER) is None
        source.check(READER)

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
    def test_a_name_that_is_not_utf8_is_listed_once_also_after_resuming(self, tmp_path: Path) -> None:
        for name in (b"a.jpg", b"a\xff.jpg", b"a\xffb.jpg", b"b.jpg"):
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
        source = PrefixSource(uri=str(tmp_path))
        whole = listed(source)
        assert whole == ["a.jpg", "a\\udcff.jpg", "a\\udcffb.jpg", "b.jpg"]
        for count in range(1, 5):
            assert listed(source, Cursor(count, f"{tmp_path}/{whole[count - 1]}")) == whole[count:]


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
    def test_glob_as_uri(self, tmp_path: Path, pattern: str, expected: list[str]) -> None:
        folder = photos(tmp_path)
        found = uris(PrefixSource(uri=f"{folder}/{pattern}").refs(READER, Cursor()))
        assert [uri.removeprefix(f"{folder}/") for uri in found] == expected
        for count, uri in enumerate(found, 1):
            resumed = uris(PrefixSource(uri=f"{folder}/{pattern}").refs(READER, Cursor(count, uri)))
            assert resumed == found[count:]

    def test_a_name_with_brackets_that_is_there_is_no_glob(self, tmp_path: Path) -> None:
        folder = tree(tmp_path / "run[1]", "a.jpg")
        assert uris(PrefixSource(uri=str(folder)).refs(READER, Cursor())) == [f"{folder}/a.jpg"]

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
    def test_include_and_exclude(
        self, tmp_path: Path, include: list[str], exclude: list[str], expected: list[str]
    ) -> None:
        assert listed(PrefixSource(uri=str(photos(tmp_path)), include=include, exclude=exclude)) == expected

    @given(st.text(alphabet="ab*?[]!-^&~|\\./", max_size=8), st.text(alphabet="ab[]!-^&~|\\./", max_size=8))
    def test_any_pattern_is_refused_or_works(self, pattern: str, path: str) -> None:
        refusable = not pattern.strip("/") or "-" in pattern  # an empty one, or a range that may run backwards
        with suppress(*[ValidationError][:refusable]):
            make_path_filter(PrefixSource(uri="photos", include=[pattern]).include, ())(path)

    @given(st.text(alphabet="ab[]!-^&~|\\.*?", min_size=1, max_size=8))
    def test_a_name_with_its_magic_in_brackets_matches_itself_alone(self, name: str) -> None:
        pattern = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
        chosen = make_path_filter((pattern,), ())
        assert chosen(name)
        assert not chosen(name + "x")


class TestResuming:
    def test_after_any_row_the_rest_comes(self, tmp_path: Path) -> None:
        source = PrefixSource(uri=str(photos(tmp_path)))
        whole = listed(source)
        for count, name in enumerate(whole, 1):
            assert listed(source, Cursor(count, f"{source.uri}/{name}")) == whole[count:]

    def test_many_images_come_in_bounded_batches(self, tmp_path: Path) -> None:
        for number in range(9000):
            tmp_path.joinpath(f"{number:05d}.jpg").touch()
        batches = list(PrefixSource(uri=str(tmp_path)).refs(READER, Cursor()))
        assert [batch.num_rows for batch in batches] == [8192, 808]
        assert uris(iter(batches)) == [f"{tmp_path}/{number:05d}.jpg" for number in range(9000)]


class TestTheOutputIsNoInput:
    @pytest.mark.parametrize("uri", ["", "/", "/**", "/*/**"])
    def test_left_out_where_it_lies_below(self, tmp_path: Path, uri: str) -> None:
        tree(tmp_path, "a/x.jpg", "out/_batchjob/y.jpg", "out2/z.jpg")
        found = uris(PrefixSource(uri=f"{tmp_path}{uri}").refs(READER, Cursor(), excluded_folder=str(tmp_path / "out")))
        assert found == [f"{tmp_path}/a/x.jpg", f"{tmp_path}/out2/z.jpg"]

    def test_also_by_another_name(self, tmp_path: Path) -> None:
        real = tree(tmp_path / "real", "a.jpg", "out/y.jpg")
        tmp_path.joinpath("link").symlink_to(real)
        source = PrefixSource(uri=f"{tmp_path}/link")
        assert listed(source, outside=f"file://{real}/out/") == ["a.jpg"]

    @pytest.mark.parametrize("out", ["", "/photos", "/photos/"])
    def test_refused_where_the_input_lies_in_it(self, tmp_path: Path, out: str) -> None:
        source = PrefixSource(uri=f"{photos(tmp_path)}")
        with pytest.raises(InvalidJob, match=r"lies in the output .*; give output.uri a folder of its own"):
            uris(source.refs(READER, Cursor(), excluded_folder=f"{tmp_path}{out}"))

    def test_elsewhere_it_does_not_matter(self, tmp_path: Path) -> None:
        source = PrefixSource(uri=str(photos(tmp_path)))
        assert len(listed(source, outside="s3://bucket/out")) == 7
        assert len(listed(source, outside=f"{tmp_path}/out")) == 7


class TestSentences:
    @pytest.mark.parametrize("name", ["absent", "absent/", "absent.jpg", "absent/*.jpg"])
    def test_nothing_there(self, tmp_path: Path, name: str) -> None:
        source = PrefixSource(uri=f"{tmp_path}/{name}")
        for ask in (lambda: source.check(READER), lambda: uris(source.refs(READER, Cursor()))):
            with pytest.raises(InvalidJob, match=rf"input.uri {tmp_path}/absent.*: nothing there; check its spelling"):
                ask()

    def test_a_pattern_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidJob, match=r"\[z-a\].jpg: not a glob pattern"):
            uris(PrefixSource(uri=f"{tmp_path}/[z-a].jpg").refs(READER, Cursor()))

    def test_what_is_required_is_not_there_yet(self, tmp_path: Path) -> None:
        source = PrefixSource(uri=f"{tmp_path}/photos", require={"marker": "_SUCCESS", "min_images": 3})
        assert source.explain_missing(READER) == f"input.uri {tmp_path}/photos: nothing there yet"
        tree(tmp_path / "photos", "a.jpg")
        missing = f"input.require.marker: {tmp_path}/photos/_SUCCESS is not there yet"
        assert source.explain_missing(READER) == missing
        glob = PrefixSource(uri=f"{tmp_path}/photos/*.jpg", require={"marker": "_SUCCESS"})
        assert glob.explain_missing(READER) == missing
        tree(tmp_path / "photos", "_SUCCESS")
        assert source.explain_missing(READER) is None
        assert glob.explain_missing(READER) is None

    def test_images_required_before_the_folder_is_there(self, tmp_path: Path) -> None:
        uri = f"{tmp_path}/photos"
        assert (
            PrefixSource(uri=uri, require={"min_images": 1}).explain_missing(READER)
            == f"input.uri {uri}: nothing there yet"
        )
        assert PrefixSource(uri=uri, require={}).explain_missing(READER) is None

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"extensions": []}, "at least 1 item"),
            ({"extensions": [""]}, "write 'all' to take every file"),
            ({"include": [""]}, "empty pattern"),
            ({"exclude": ["[z-a]"]}, "is not a glob pattern"),
            ({"require": {"min_images": 0}}, "greater than or equal to 1"),
            ({"require": {"marker": ""}}, "at least 1 character"),
            ({"glob": "*"}, "Extra inputs are not permitted"),
        ],
    )
    def test_settings_that_are_wrong(self, settings: dict[str, object], said: str) -> None:
        with pytest.raises(ValidationError, match=said):
            PrefixSource(uri="photos", **settings)


class TestOnS3:
    def test_folder_glob_file_and_resuming(self, s3: Seaweed, tmp_path: Path) -> None:
        root = s3.bucket("sources")
        s3.put_tree(photos(tmp_path), root + "photos")
        s3.put(root + "photos2/other.jpg", b"x")
        names = ["B.JPEG", "a-b/y.webp", "a.jpg", "a/deep/er/z.tiff", "a/x.png", "with space.bmp", "é.jpg"]
        for uri in (f"{root}photos", f"{root}photos/"):
            source = PrefixSource(uri=uri)
            whole = uris(source.refs(READER, Cursor()))
            assert sorted(whole) == sorted(f"{root}photos/{name}" for name in names)
            for count, location in enumerate(whole, 1):
                assert uris(source.refs(READER, Cursor(count, location))) == whole[count:]
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
    def test_globs(self, s3: Seaweed, tmp_path: Path, pattern: str, expected: list[str]) -> None:
        root = s3.bucket("sources")
        s3.put_tree(photos(tmp_path), root + "photos")
        found = uris(PrefixSource(uri=f"{root}photos/{pattern}").refs(READER, Cursor()))
        assert sorted(found) == sorted(f"{root}photos/{name}" for name in expected)
        for count, location in enumerate(found, 1):
            resumed = uris(PrefixSource(uri=f"{root}photos/{pattern}").refs(READER, Cursor(count, location)))
            assert resumed == found[count:]

    def test_output_marker_and_nothing(self, s3: Seaweed) -> None:
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
        assert uris(source.refs(READER, Cursor(), excluded_folder=f"{root}in/out")) == [f"{root}in/a.jpg"]
        with pytest.raises(InvalidJob, match="lies in the output"):
            uris(source.refs(READER, Cursor(), excluded_folder=root))


def test_the_sample_photographs(test_data: Path) -> None:
    folder = test_data / "imagenet-sample"
    found = uris(PrefixSource(uri=str(folder)).refs(READER, Cursor()))
    assert found == sorted(map(str, folder.rglob("*.JPEG")), key=str.encode)
    assert len(found) == 300
