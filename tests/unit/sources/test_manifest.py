"""The manifest source: formats, types, locations, part files, resuming, errors of bad input."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjob.errors import InvalidJob
from batchjob.sources.manifest import ManifestSource
from batchjob.sources.prefix import PrefixSource
from batchjob.sources.source import REF_FIELDS, Source
from batchjob.storage.reader import Reader
from batchjob.types import Cursor
from tests.support.seaweed import Seaweed

READER = Reader()
START = Cursor()

Write = Callable[[Path, list[dict[str, Any]]], Path]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"), row_group_size=3)
    return path.with_suffix(".parquet")


def encode_csv(rows: list[dict[str, Any]]) -> bytes:
    def cell(value: Any) -> str:
        return "" if value is None else f'"{value}"' if isinstance(value, str) else str(value)

    lines = [",".join(rows[0]), *(",".join(map(cell, row.values())) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


def encode_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make_writer(ending: str, encode: Callable[[list[dict[str, Any]]], bytes]) -> Write:
    def write(path: Path, rows: list[dict[str, Any]]) -> Path:
        path = path.with_name(path.name + ending)
        path.write_bytes(encode(rows))
        return path

    return write


WRITERS: dict[str, Write] = {
    "parquet": write_parquet,
    "csv": make_writer(".csv", encode_csv),
    "jsonl": make_writer(".jsonl", encode_jsonl),
    "csv.gz": make_writer(".csv.gz", lambda rows: gzip.compress(encode_csv(rows))),
    "jsonl.gz": make_writer(".ndjson.gz", lambda rows: gzip.compress(encode_jsonl(rows))),
}

ROWS = [
    {"image": f"img/{number}.jpg", "sku": number * 10, "country": "de" if number % 2 else None, "bytes": 100 + number}
    for number in range(10)
]


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest) -> Write:
    return WRITERS[request.param]


def write_file(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def read_table(source: Source, after: Cursor = START, excluded_folder: str | None = None) -> pa.Table:
    return pa.Table.from_batches(list(source.refs(READER, after, excluded_folder)))


def make_source(uri: str | Path, **settings: Any) -> ManifestSource:
    return ManifestSource(**{"uri": str(uri), "uri_column": "image", **settings})


def error_of(source: ManifestSource) -> str:
    with pytest.raises(InvalidJob) as caught:
        read_table(source)
    assert "\n" not in caught.value.message
    return caught.value.message


class TestFormats:
    def test_rows_have_sizes_and_typed_passthrough_in_order(self, tmp_path: Path, write: Write) -> None:
        path = write(tmp_path / "index", ROWS)
        source = make_source(path, size_column="bytes", passthrough={"sku": "int64", "country": "string"})

        table = read_table(source)

        expected = pa.schema([*REF_FIELDS, pa.field("sku", pa.int64()), pa.field("country", pa.string())])
        assert table.schema.equals(expected)
        assert source.fields(READER) == [expected.field("sku"), expected.field("country")]
        assert table.column("uri").to_pylist() == [row["image"] for row in ROWS]
        assert table.column("location").to_pylist() == [f"{tmp_path}/{row['image']}" for row in ROWS]
        assert table.column("size").to_pylist() == [row["bytes"] for row in ROWS]
        assert table.column("etag").null_count == 10
        assert table.column("sku").to_pylist() == [row["sku"] for row in ROWS]
        assert table.column("country").to_pylist() == [row["country"] for row in ROWS]

    def test_untyped_passthrough_is_text_except_in_parquet(self, tmp_path: Path, write: Write) -> None:
        path = write(tmp_path / "index", ROWS)
        table = read_table(make_source(path, passthrough=["sku"]))
        kind = pa.int64() if path.suffix == ".parquet" else pa.string()
        assert table.column("sku").type == kind
        assert table.column("sku").cast(pa.int64()).to_pylist() == [row["sku"] for row in ROWS]

    def test_refs_resume_after_any_row(self, tmp_path: Path, write: Write) -> None:
        source = make_source(write(tmp_path / "index", ROWS), passthrough=["sku"])
        whole = read_table(source)
        for count in range(13):
            assert read_table(source, Cursor(count, "ignored")).equals(whole.slice(count)), count

    def test_manifest_without_rows_is_one_empty_batch(self, tmp_path: Path) -> None:
        empty = pa.table({"image": pa.array([], pa.string()), "sku": pa.array([], pa.int8())})
        pq.write_table(empty, tmp_path / "none.parquet")
        files = {
            str(tmp_path / "none.parquet"): pa.int8(),
            write_file(tmp_path / "none.csv", "image,sku\n"): pa.string(),
            write_file(tmp_path / "bare.csv", "image,sku"): pa.string(),
            write_file(tmp_path / "none.jsonl", ""): pa.string(),
        }
        for uri, kind in files.items():
            (batch,) = make_source(uri, passthrough=["sku"]).refs(READER, START)
            assert batch.num_rows == 0
            assert batch.schema.equals(pa.schema([*REF_FIELDS, pa.field("sku", kind)]))

    def test_id_and_etag_columns_are_read(self, tmp_path: Path, write: Write) -> None:
        rows: list[dict[str, Any]] = [
            {"image": "a.jpg", "key": "k1", "tag": '"abc"'},
            {"image": "b.jpg", "key": "k2", "tag": None},
        ]
        if write is not WRITERS["parquet"]:
            rows[0]["tag"] = "abc"
        table = read_table(
            make_source(write(tmp_path / "m", rows), id_column="key", etag_column="tag", passthrough=["tag"])
        )
        assert table.schema.names == ["uri", "location", "size", "etag", "id", "tag"]
        assert table.column("id").to_pylist() == ["k1", "k2"]
        assert table.column("etag").to_pylist() == ["abc", None]

    def test_large_manifest_is_read_in_bounded_batches(self, tmp_path: Path, write: Write) -> None:
        rows = [{"image": f"{number}.jpg", "n": number} for number in range(20_000)]
        source = make_source(write(tmp_path / "m", rows), passthrough={"n": "int32"})
        batches = list(source.refs(READER, Cursor(9_000)))
        assert max(batch.num_rows for batch in batches) <= 8192
        assert pa.Table.from_batches(batches).column("n").to_pylist() == list(range(9_000, 20_000))

    def test_listing_can_be_abandoned(self, tmp_path: Path, write: Write) -> None:
        rows = [{"image": f"{number}.jpg", "text": "x" * 200} for number in range(30_000)]
        source = make_source(write(tmp_path / "m", rows), passthrough=["text"])
        for _ in range(5):
            batches = source.refs(READER, START)
            assert next(batches).num_rows
            del batches

    def test_both_sources_follow_the_protocol(self, tmp_path: Path) -> None:
        sources: list[Source] = [
            make_source(write_file(tmp_path / "m.csv", "image\na.jpg\n")),
            PrefixSource(uri=str(tmp_path)),
        ]
        for source in sources:
            source.check(READER)
            assert source.explain_missing(READER) is None
            assert [field.name for field in source.fields(READER)] == []


class TestCsv:
    def test_csv_quotes_line_ends_byte_order_mark_and_empty_lines(self, tmp_path: Path) -> None:
        text = '\ufeffimage,note\r\n"a,1.jpg","two\nlines"\r\n\r\nb.jpg,""\r\nc.jpg,\r\nd.jpg,NA'
        table = read_table(make_source(write_file(tmp_path / "m.csv", text), passthrough=["note"]))
        assert table.column("uri").to_pylist() == ["a,1.jpg", "b.jpg", "c.jpg", "d.jpg"]
        assert table.column("note").to_pylist() == ["two\nlines", "", None, "NA"]

    def test_csv_values_are_cast_to_the_given_types(self, tmp_path: Path) -> None:
        values = {
            "int64": (" 5 ", 5),
            "uint8": ("255", 255),
            "float64": ("1e3", 1000.0),
            "bool": ("True", True),
            "date32": ("2026-11-19", datetime.date(2026, 11, 19)),
            "timestamp": ("2026-11-19 01:02:03", datetime.datetime(2026, 11, 19, 1, 2, 3)),  # noqa: DTZ001
            "timestamp[ms]": ("2026-11-19T01:02:03", datetime.datetime(2026, 11, 19, 1, 2, 3)),  # noqa: DTZ001
            "timestamp[us, tz=UTC]": (
                "2026-11-19T01:02:03+01:00",
                datetime.datetime(2026, 11, 19, 0, 2, 3, tzinfo=datetime.UTC),
            ),
            "large_string": ("x", "x"),
        }
        names = [f"c{number}" for number in range(len(values))]
        text = ",".join(["image", *names]) + "\n" + ",".join(["a.jpg", *(given for given, _ in values.values())])
        text += "\nb.jpg" + "," * len(values) + "\n"
        source = make_source(write_file(tmp_path / "m.csv", text), passthrough=dict(zip(names, values, strict=True)))
        first, second = read_table(source).select(names).to_pylist()
        assert list(first.values()) == [expected for _, expected in values.values()]
        assert set(second.values()) == {None}

    def test_decimal_type_is_accepted(self, tmp_path: Path) -> None:
        uri = write_file(tmp_path / "m.csv", "image,price\na.jpg,12.50\n")
        (field,) = make_source(uri, passthrough={"price": "decimal128(10, 2)"}).fields(READER)
        assert field.type == pa.decimal128(10, 2)

    def test_value_that_does_not_fit_names_its_row(self, tmp_path: Path, write: Write) -> None:
        rows = [{"image": f"{number}.jpg", "n": "7" if number != 9_001 else "7x"} for number in range(10_000)]
        path = write(tmp_path / "m", rows)
        message = error_of(make_source(path, passthrough={"n": "int64"}))
        assert message == (
            f"{path}, row 9002: '7x' in column 'n' is no int64; correct it, or give the column another type"
        )

    def test_unexpected_time_zone_is_explained(self, tmp_path: Path) -> None:
        uri = write_file(tmp_path / "m.csv", "image,t\na.jpg,2026-11-19T01:02:03Z\n")
        assert "give the type a time zone" in error_of(make_source(uri, passthrough={"t": "timestamp"}))

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("image,n\na.jpg\n", "Expected 2 columns, got 1"),
            (b"image,n\n\xff.jpg,1\n", "save it as UTF-8"),
            ("", "is empty; its first line must name its columns"),
            ("image,n\na.jpg,1\n,2\n", "row 2: no image in column 'image'; fill it, or drop the row"),
            ("image,n\na.jpg,1\n  ,2\n", "row 2: no image in column 'image'"),
            ("image,n,n\na.jpg,1,2\n", "has 2 columns called 'n'; rename all but one"),
            ("image;m\na.jpg;1\n", "has no column 'n'; it has: image, m"),
            ("x.jpg,1\na.jpg,2\n", "begins with a row of images, not with the names of its columns; give it a first"),
            (b"PK\x03\x04\0\0", "is a zip archive or an Excel sheet; save it as CSV"),
            (b"PAR1\0\0", "is Parquet; give input.format: parquet"),
            ("<!DOCTYPE html>\n<html>", "is a web page; download the file itself"),
            ("image,n\na.jpg,1\n".encode("utf-16")[:-1], "cannot be read as csv"),
        ],
    )
    def test_damaged_csv_is_reported(self, tmp_path: Path, text: str | bytes, expected: str) -> None:
        uri = write_file(tmp_path / "m.csv", text)
        message = error_of(make_source(uri, passthrough=["n"]))
        assert expected in message
        assert uri in message

    def test_damaged_gzip_is_reported(self, tmp_path: Path) -> None:
        whole = gzip.compress(b"image\n" + repr(list(range(4000))).encode() + b"\n")
        assert "cannot be read as csv" in error_of(make_source(write_file(tmp_path / "a.csv.gz", whole[:-9])))
        assert "cannot be read as jsonl" in error_of(make_source(write_file(tmp_path / "c.jsonl.gz", whole[:-9])))


class TestJsonLines:
    def test_json_values_are_text_as_written(self, tmp_path: Path) -> None:
        values = ['"t"', "1.50", "-7", "1e400", "true", "null", '[1.0, "ü"]', '{"a": {"b": 2.50}}', '"\\u00fc"']
        text = "".join(f'{{"image": "a.jpg", "v": {value}}}\r\n\n' for value in values)
        table = read_table(make_source(write_file(tmp_path / "m.jsonl", "\ufeff" + text), passthrough=["v"]))
        expected = ["t", "1.50", "-7", "1e400", "true", None, '[1.0, "ü"]', '{"a": {"b": 2.5}}', "ü"]
        assert table.column("v").to_pylist() == expected

    def test_json_values_are_cast_to_the_given_types(self, tmp_path: Path) -> None:
        text = '{"image": "a.jpg", "n": 5, "b": true}\n{"image": "b.jpg", "n": "6"}'
        table = read_table(make_source(write_file(tmp_path / "m.json", text), passthrough={"n": "int8", "b": "bool"}))
        assert table.column("n").to_pylist() == [5, 6]
        assert table.column("b").to_pylist() == [True, None]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ('{"image": "a.jpg"}\n\n{"image": \n', "line 3: not JSON"),
            (
                '[\n{"image": "a.jpg"}\n]\n',
                "line 1: not JSON .*write one object a line, as `jq -c .*` does of an array",
            ),
            ('[{"image": "a.jpg"}]\n', "line 1: not a JSON object; write one object a line"),
            ('{"image": "a.jpg"}\n{"image": null}\n', "row 2: no image"),
            ('{"image": "a.jpg"}\n{"imag": "b.jpg"}\n', "row 2: no image"),
            ('{"image": "a.jpg", "image": "b.jpg"}\n', "line 1: .*'image' is named twice"),
            ('{"image": "a.jpg"}\n{"image": "\\ud800.jpg"}\n', "line 2: half a surrogate pair"),
            (b'{"image": "\xff.jpg"}\n', "line 1: not JSON"),
            ("[" * 200_000, "line 1: not JSON"),
            ('{"imag": "a.jpg"}\n', r"\(in its first rows\) has no column 'image' \(did you mean 'imag'\?\)"),
        ],
    )
    def test_damaged_json_lines_are_reported(self, tmp_path: Path, text: str | bytes, expected: str) -> None:
        uri = write_file(tmp_path / "m.jsonl", text)
        with pytest.raises(InvalidJob, match=expected) as caught:
            read_table(make_source(uri))
        assert uri in caught.value.message


class TestParquet:
    @pytest.mark.parametrize("name", ["m.parquet", "m.pq"])
    def test_damaged_column_name_is_reported(self, tmp_path: Path, name: str) -> None:
        pq.write_table(pa.table({"image": ["a.jpg"], "n\u00e9e": [1]}), tmp_path / name)
        damaged = (tmp_path / name).read_bytes().replace("n\u00e9e".encode(), b"n\xc3\xf3e")
        (tmp_path / name).write_bytes(damaged)
        message = error_of(make_source(str(tmp_path / name)))
        assert "cannot be read as parquet" in message
        assert str(tmp_path / name) in message

    def save(self, path: Path, **columns: pa.Array) -> str:
        count = len(next(iter(columns.values())))
        pq.write_table(pa.table({"image": [f"{number}.jpg" for number in range(count)], **columns}), path)
        return str(path)

    def test_parquet_types_are_kept_in_plain_form(self, tmp_path: Path) -> None:
        dictionary = pa.array(["x", "y"]).dictionary_encode()
        columns = {
            "nested": pa.array([{"a": [1, 2]}, None]),
            "time": pa.array([1, 2], pa.timestamp("us", "UTC")),
            "large": pa.array(["x", None], pa.large_string()),
            "coded": dictionary,
            "inside": pa.StructArray.from_arrays([dictionary], ["d"]),
            "listed": pa.ListArray.from_arrays([0, 1, 2], dictionary),
            "view": pa.array(["x", "y"], pa.string_view()),
            "unique": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16, b"1" * 16], pa.binary(16))),
        }
        source = make_source(self.save(tmp_path / "m.parquet", **columns), passthrough=list(columns))
        kinds = {field.name: field.type for field in source.fields(READER)}
        assert kinds == {
            "nested": columns["nested"].type,
            "time": pa.timestamp("us", "UTC"),
            "large": pa.large_string(),
            "coded": pa.string(),
            "inside": pa.struct([("d", pa.string())]),
            "listed": pa.list_(pa.string()),
            "view": pa.string(),
            "unique": pa.binary(16),
        }
        table = read_table(source)
        for name, array in columns.items():
            stored = array.storage if isinstance(array, pa.ExtensionArray) else array
            assert table.column(name).to_pylist() == stored.to_pylist()
            assert table.schema.field(name).nullable

    @pytest.mark.parametrize("kind", [pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
    def test_uri_column_may_have_any_text_type(self, tmp_path: Path, kind: pa.DataType) -> None:
        pq.write_table(pa.table({"image": pa.array(["a.jpg", "b.jpg"]).cast(kind)}), tmp_path / "m.parquet")
        assert read_table(make_source(tmp_path / "m.parquet")).column("uri").to_pylist() == ["a.jpg", "b.jpg"]

    def test_uri_column_of_numbers_is_refused(self, tmp_path: Path) -> None:
        uri = self.save(tmp_path / "m.parquet", n=pa.array([1]))
        assert error_of(make_source(uri, uri_column="n")) == (
            f"input.uri_column: column 'n' of {uri} is int64; it must be text"
        )

    def test_column_of_nulls_requires_a_type(self, tmp_path: Path) -> None:
        uri = self.save(tmp_path / "m.parquet", gone=pa.nulls(2), deep=pa.array([{"a": None}, {"a": None}]))
        message = error_of(make_source(uri, passthrough=["gone"]))
        assert f"column 'gone' of {uri} holds only nulls and has no type; give it one, as in passthrough: " in message
        assert "has no type" in error_of(make_source(uri, passthrough=["deep"]))
        typed = read_table(make_source(uri, passthrough={"gone": "string"}))
        assert typed.column("gone").to_pylist() == [None, None]

    def test_parquet_values_are_cast_to_the_given_types(self, tmp_path: Path) -> None:
        columns = {"n": pa.array(["5", ""]).dictionary_encode(), "f": pa.array([1.0, None])}
        uri = self.save(tmp_path / "m.parquet", **columns, nested=pa.array([[1], [2]]))
        table = read_table(make_source(uri, passthrough={"n": "int32", "f": "int64"}))
        assert table.column("n").to_pylist() == [5, None]
        assert table.column("f").to_pylist() == [1, None]
        message = error_of(make_source(uri, passthrough={"nested": "int64"}))
        assert "column 'nested' of" in message
        assert "cannot become int64" in message

    def test_lossy_cast_is_refused(self, tmp_path: Path) -> None:
        uri = self.save(tmp_path / "m.parquet", f=pa.array([1.0, 1.5]))
        assert "row 2: 1.5 in column 'f' is no int64" in error_of(make_source(uri, passthrough={"f": "int64"}))

    def test_size_column_is_cast_and_checked(self, tmp_path: Path) -> None:
        uri = self.save(tmp_path / "m.parquet", size=pa.array([7.0, None]), bad=pa.array([1, -1]))
        assert read_table(make_source(uri, size_column="size")).column("size").to_pylist() == [7, None]
        assert "row 2: a negative size in column 'bad'" in error_of(make_source(uri, size_column="bad"))

    def test_duplicate_columns_and_damaged_files_are_reported(self, tmp_path: Path) -> None:
        pq.write_table(pa.table([["a.jpg"], [1], [2]], names=["image", "n", "n"]), tmp_path / "twice.parquet")
        assert "has 2 columns called 'n'" in error_of(make_source(tmp_path / "twice.parquet", passthrough=["n"]))
        assert read_table(make_source(tmp_path / "twice.parquet")).num_rows == 1
        for name, body in {
            "none": b"",
            "text": b"image\na.jpg\n",
            "cut": Path(tmp_path / "twice.parquet").read_bytes()[:-5],
        }.items():
            uri = write_file(tmp_path / f"{name}.parquet", body)
            assert f"input.uri: {uri} cannot be read as parquet (" in error_of(make_source(uri))

    def test_damaged_pages_are_reported(self, tmp_path: Path) -> None:
        uri = self.save(tmp_path / "m.parquet", n=pa.array(range(5000)))
        body = bytearray(Path(uri).read_bytes())
        body[40:4000] = b"\xff" * 3960
        write_file(Path(uri), bytes(body))
        assert "cannot be read as parquet" in error_of(make_source(uri))


class TestLocations:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("img/a.jpg", "{}/img/a.jpg"),
            ("a b%20c#?.jpg", "{}/a b%20c#?.jpg"),
            ("./a.jpg", "{}/a.jpg"),
            ("x/../a.jpg", "{}/a.jpg"),
            ("../a.jpg", "{}/../a.jpg"),
            ("x/.hidden/..a.jpg", "{}/x/.hidden/..a.jpg"),
            ("/data/a.jpg", "/data/a.jpg"),
            ("/data/../a.jpg", "/data/../a.jpg"),
            ("s3://bucket/a/../b.jpg", "s3://bucket/a/../b.jpg"),
            ("S3://bucket/a.jpg?x=1", "S3://bucket/a.jpg?x=1"),
            ("file:///data/a.jpg", "file:///data/a.jpg"),
            ("C:x.jpg", "{}/C:x.jpg"),
        ],
    )
    def test_relative_location_is_resolved_in_the_manifest_folder(
        self, tmp_path: Path, given: str, expected: str
    ) -> None:
        expected = expected.format(tmp_path)
        expected = os.path.normpath(expected) if expected.startswith(f"{tmp_path}/..") else expected
        uri = write_file(tmp_path / "m.jsonl", json.dumps({"image": "plain.jpg"}) + "\n" + json.dumps({"image": given}))
        table = read_table(make_source(f"file://{uri}"))
        assert table.column("uri").to_pylist() == ["plain.jpg", given]
        assert table.column("location").to_pylist() == [f"{tmp_path}/plain.jpg", expected]

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
    def test_folder_that_is_not_utf8_is_read(self, tmp_path: Path) -> None:
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff%"))
        uri = write_file(folder / "m.csv", "image\na%20b.jpg\n../c.jpg\n/data/50%.jpg\n")
        for name in (folder / "a%20b.jpg", tmp_path / "c.jpg"):
            write_file(name, name.name)
        glob = f"{tmp_path}/?%/*.csv"
        assert write_file(folder / "m.csv", Path(uri).read_bytes()) == uri
        locations = read_table(make_source(glob)).column("location").to_pylist()
        assert locations == [f"file://{tmp_path}/%FF%25/a%2520b.jpg", f"file://{tmp_path}/c.jpg", "/data/50%.jpg"]
        assert [READER.read(location).data for location in locations[:2]] == [b"a%20b.jpg", b"c.jpg"]

    def test_relative_locations_on_s3(self, s3: Seaweed) -> None:
        root = s3.bucket("sources")
        s3.put(f"{root}index/m.csv", b"image\na.jpg\n../b.jpg\n./c//d.jpg\n/data/e.jpg\n../../../../f.jpg\n")
        expected = [
            f"{root}index/a.jpg",
            f"{root}b.jpg",
            f"{root}index/c//d.jpg",
            "/data/e.jpg",
            f"{root}index/../../../../f.jpg",  # outside the bucket: it cannot be read, and becomes an error row
        ]
        assert read_table(make_source(f"{root}index/m.csv")).column("location").to_pylist() == expected

    def test_image_in_the_output_is_refused(self, tmp_path: Path) -> None:
        uri = write_file(tmp_path / "m.csv", "image\nin/a.jpg\nout/a.jpg\n")
        assert read_table(make_source(uri), excluded_folder=f"{tmp_path}/ou").num_rows == 2
        with pytest.raises(InvalidJob, match=r"row 2: out/a.jpg lies in the output .*; give output.uri a folder"):
            read_table(make_source(uri), excluded_folder=f"{tmp_path}/out/")
        with pytest.raises(InvalidJob, match="lies in the output"):
            read_table(make_source(uri), excluded_folder=str(tmp_path))


class TestPartFiles:
    def parts(self, folder: Path, write: Write) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        for name, start in (("part-10", 4), ("part-2", 7), ("part-1", 0)):
            write(folder / name, ROWS[start : {4: 7, 7: 10, 0: 4}[start]])
        write(folder / "_hidden", ROWS)
        write(folder / ".hidden", ROWS)
        write_file(folder / "_SUCCESS", b"")
        write_file(folder / "README.md", "not a part")
        (folder / "below").mkdir()
        write(folder / "below" / "part-0", ROWS)
        return [f"img/{number}.jpg" for number in range(10)]

    def test_part_files_are_read_in_the_order_of_names(self, tmp_path: Path, write: Write) -> None:
        images = self.parts(tmp_path / "index", write)
        for uri in (f"{tmp_path}/index", f"{tmp_path}/index/"):
            source = make_source(uri, passthrough={"country": "string"})
            whole = read_table(source)
            assert whole.column("uri").to_pylist() == images
            assert whole.column("location").to_pylist() == [f"{tmp_path}/index/{image}" for image in images]
            for count in range(12):
                assert read_table(source, Cursor(count)).equals(whole.slice(count))

    def test_glob_of_part_files_is_read(self, tmp_path: Path, write: Write) -> None:
        self.parts(tmp_path / "index", write)
        assert read_table(make_source(f"{tmp_path}/index/part-1*")).num_rows == 7
        deep = read_table(make_source(f"{tmp_path}/index/**/part-*"))
        assert deep.num_rows == 20
        assert deep.column("location")[0].as_py() == f"{tmp_path}/index/below/{ROWS[0]['image']}"

    def test_glob_skips_hidden_folders_and_the_output(self, tmp_path: Path) -> None:
        for name in ("a/m.csv", "_temporary/m.csv", "out/predictions/m.csv"):
            write_file(tmp_path / "in" / name, f"image\n{name}.jpg\n")
        source, out = make_source(f"{tmp_path}/in/**/*.csv"), f"{tmp_path}/in/out"
        assert read_table(source, excluded_folder=out).column("uri").to_pylist() == ["a/m.csv.jpg"]
        before = source.version(READER, excluded_folder=out)
        write_file(tmp_path / "in/out/predictions/n.csv", "image\nx.jpg\n")
        assert source.version(READER, excluded_folder=out) == before != source.version(READER)

    def test_part_files_may_store_a_column_in_different_types(self, tmp_path: Path) -> None:
        kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.null()]
        for number, kind in enumerate(kinds):
            image = pa.array([f"{number}.jpg"]).cast(pa.large_string() if number % 2 else pa.string())
            note = pa.nulls(1) if pa.types.is_null(kind) else pa.array(["x"]).cast(kind)
            count = pa.array([number], pa.int64() if number else pa.int16())
            pq.write_table(pa.table({"note": note, "image": image, "n": count}), tmp_path / f"{number}.parquet")
        table = read_table(make_source(tmp_path, passthrough=["n", "note"]))
        assert table.column("note").to_pylist() == ["x", "x", "x", None]
        assert table.column("n").type == pa.int16()
        assert table.column("n").to_pylist() == [0, 1, 2, 3]

    def test_incompatible_part_files_are_refused(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": ["a.jpg"], "n": [1]}), tmp_path / "0.parquet")
        pq.write_table(pa.table({"image": ["a.jpg"], "n": [[1]]}), tmp_path / "1.parquet")
        message = error_of(make_source(tmp_path, passthrough=["n"]))
        assert f"{tmp_path}/1.parquet: column 'n' is list<" in message
        pq.write_table(pa.table({"image": ["a.jpg"]}), tmp_path / "1.parquet")
        assert f"{tmp_path}/1.parquet has no column 'n'" in error_of(make_source(tmp_path, passthrough=["n"]))

    def test_empty_part_files_are_skipped(self, tmp_path: Path) -> None:
        write_file(tmp_path / "a.csv", "")
        write_file(tmp_path / "b.csv", "image\nb.jpg\n")
        write_file(tmp_path / "c.csv", "")
        assert read_table(make_source(tmp_path)).column("uri").to_pylist() == ["b.jpg"]

    def test_two_formats_in_one_folder_are_refused(self, tmp_path: Path) -> None:
        write_file(tmp_path / "a.csv", "image\na.jpg\n")
        write_file(tmp_path / "b.jsonl", '{"image": "b.jpg"}\n')
        assert "both csv and jsonl files; choose with a glob or input.format" in error_of(make_source(tmp_path))
        assert read_table(make_source(tmp_path, format="jsonl")).column("uri").to_pylist() == ["b.jpg"]

    def test_format_without_a_known_ending_must_be_given(self, tmp_path: Path) -> None:
        uri = write_file(tmp_path / "part-00000", "image\na.jpg\n")
        assert (
            error_of(make_source(uri)) == f"input.uri {uri}: no known ending; give input.format: parquet, csv or jsonl"
        )
        assert "no manifest files in it (1 others)" in error_of(make_source(tmp_path))
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos/A.JPG").write_bytes(b"")
        assert "for the images themselves write input.type: prefix" in error_of(make_source(tmp_path / "photos"))
        assert read_table(make_source(uri, format="csv")).num_rows == 1
        assert read_table(make_source(tmp_path, format="csv")).num_rows == 1

    def test_version_changes_with_the_files(self, tmp_path: Path) -> None:
        path = Path(write_file(tmp_path / "index/a.csv", "image\na.jpg\n"))
        source = make_source(tmp_path / "index")
        seen = [source.version(READER), source.version(READER)]
        assert seen[0] == seen[1]
        os.utime(path, ns=(1, 1))
        seen.append(source.version(READER))
        write_file(tmp_path / "index/b.csv", "image\nb.jpg\n")
        seen.append(source.version(READER))
        assert len(set(seen)) == 3

    def test_part_files_on_s3(self, s3: Seaweed, tmp_path: Path, write: Write) -> None:
        images = self.parts(tmp_path / "index", write)
        root = s3.bucket("sources")
        s3.put_tree(tmp_path / "index", f"{root}index")
        source = make_source(f"{root}index", passthrough=["country"], require={"marker": "_SUCCESS"})
        whole = read_table(source)
        assert whole.column("uri").to_pylist() == images
        assert whole.column("location").to_pylist() == [f"{root}index/{image}" for image in images]
        assert read_table(source, Cursor(5)).equals(whole.slice(5))
        assert read_table(make_source(f"{root}index/part-1*")).num_rows == 7
        assert source.explain_missing(READER) is None
        assert source.version(READER) == source.version(READER)


class TestErrors:
    def test_missing_column_names_the_nearest_one(self, tmp_path: Path, write: Write) -> None:
        path = write(tmp_path / "m", ROWS)
        keys: dict[str, dict[str, Any]] = {
            "uri_column": {"uri_column": "imag"},
            "passthrough": {"passthrough": ["SKU"]},
            "size_column": {"size_column": "byte"},
            "etag_column": {"etag_column": "tag"},
            "id_column": {"id_column": "countri"},
        }
        for key, settings in keys.items():
            message = error_of(make_source(path, **settings))
            assert message.startswith(f"input.{key}: {path}")
            assert message.endswith("it has: image, sku, country, bytes")
            assert ("did you mean" in message) == (key != "etag_column")
            with pytest.raises(InvalidJob, match="has no column"):
                make_source(path, **settings).check(READER)

    def test_absent_manifest_is_reported(self, tmp_path: Path) -> None:
        for name in ("absent.csv", "absent/", "absent/*.csv"):
            assert f"input.uri {tmp_path}/absent" in error_of(make_source(f"{tmp_path}/{name}"))
        tmp_path.joinpath("empty").mkdir()
        assert "no manifest files in it (0 others); name a file" in error_of(make_source(tmp_path / "empty"))

    def test_marker_of_a_single_file_is_in_its_folder(self, tmp_path: Path) -> None:
        source = make_source(tmp_path / "m.csv", require={"marker": "_SUCCESS"})
        assert source.explain_missing(READER) == f"input.uri {tmp_path}/m.csv: nothing there yet"
        write_file(tmp_path / "m.csv", "image\na.jpg\n")
        assert source.explain_missing(READER) == f"input.require.marker: {tmp_path}/_SUCCESS is not there yet"
        write_file(tmp_path / "_SUCCESS", "")
        assert source.explain_missing(READER) is None

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"passthrough": ["a", "b", "a"]}, "names 'a' twice"),
            ({"passthrough": ["size", "id"]}, "'id', 'size' is what batchjob calls a column of its own"),
            ({"passthrough": {"uri": "string"}}, "'uri' is what batchjob calls"),
            ({"passthrough": {"a": "int46"}}, r"'int46' is not a type \(did you mean 'int64'\?\); there are: string"),
            ({"passthrough": {"a": "null"}}, "'null' is not a type"),
            ({"passthrough": {"a": "list<int64>"}}, "is not a type"),
            ({"passthrough": {"a": "decimal128(99, 2)"}}, "precision"),
            ({"passthrough": [""]}, "is empty"),
            ({"uri_column": ""}, "is empty"),
            ({"format": "tsv"}, "'auto', 'parquet', 'csv' or 'jsonl'"),
            ({"delimiter": "::"}, "'::' is no delimiter; give one character, such as ';' or"),
            ({"delimiter": '"'}, "is no delimiter"),
            ({"passthrough": {"a": {"as": "uri"}}}, "'uri' is what batchjob calls .* as in passthrough: {uri: {as: my"),
            ({"passthrough": {"a": {"as": "b"}, "b": {}}}, "names 'b' twice"),
            ({"passthrough": {"a": {"name": "b"}}}, "must be 'as' or 'type'"),
            ({"passthrough": {"a": {"type": "int46"}}}, "'int46' is not a type"),
        ],
    )
    def test_invalid_settings_are_refused(self, settings: dict[str, Any], expected: str) -> None:
        with pytest.raises(InvalidJob, match=expected):
            make_source("m.csv", **settings)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """The file is read in a stream: memory in use does not grow with its size."""
    rows = 200_000
    table = pa.table({"image": [f"images/{number:09d}.jpg" for number in range(rows)], "n": range(rows)})
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=rows)
    del table

    def held(source: ManifestSource) -> Iterator[int]:
        for _ in source.refs(READER, START):
            yield pa.total_allocated_bytes()

    before = pa.total_allocated_bytes()
    most = max(held(make_source(tmp_path / "m.parquet", passthrough=["n"]))) - before
    assert most < 12 << 20
