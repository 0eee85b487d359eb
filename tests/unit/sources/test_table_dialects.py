"""Tables as people have them: delimiters, encodings, compressions, numbers of pandas, images in a column."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchjob.errors import InvalidJob
from batchjob.sources.manifest import ManifestSource
from batchjob.storage.reader import Reader
from batchjob.types import Cursor
from tests.support.seaweed import Seaweed

READER = Reader()
ROWS = [{"path": f"in/{number}.png", "label": f"é,;\t|{number}" if number % 2 else None} for number in range(50)]


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def read_rows(uri: str, after: int = 0, **settings: Any) -> list[dict[str, Any]]:
    source = ManifestSource(**{"uri": uri, "uri_column": "path", **settings})
    rows = pa.Table.from_batches(list(source.refs(READER, Cursor(after)))).drop_columns(["location", "size", "etag"])
    return [{"path": row.pop("uri"), **row} for row in rows.to_pylist()]


def encode_csv(delimiter: str, line_end: str = "\n") -> str:
    lines = [f"path{delimiter}label"]
    lines += [
        f'{row["path"]}{delimiter}"{row["label"]}"' if row["label"] else f"{row['path']}{delimiter}" for row in ROWS
    ]
    return line_end.join(lines) + line_end


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
class TestDelimiters:
    def test_delimiter_is_found_by_the_columns_of_the_job(self, tmp_path: Path, delimiter: str, line_end: str) -> None:
        uri = write(tmp_path / "m.csv", encode_csv(delimiter, line_end))
        assert read_rows(uri, passthrough=["label"]) == ROWS
        assert read_rows(uri, 17, passthrough=["label"]) == ROWS[17:]
        assert read_rows(uri) == [{"path": row["path"]} for row in ROWS]

    def test_delimiter_may_be_set(self, tmp_path: Path, delimiter: str, line_end: str) -> None:
        uri = write(tmp_path / "m.txt", encode_csv(delimiter, line_end))
        assert read_rows(uri, passthrough=["label"], delimiter=delimiter) == ROWS
        other = ";" if delimiter != ";" else "|"
        with pytest.raises(InvalidJob, match="has no column 'path'"):
            read_rows(uri, delimiter=other)


@pytest.mark.parametrize(
    ("name", "text", "settings"),
    [
        ("m.tsv", "path\tlabel\na\tx,y\n", {}),
        ("m.csv", "path;a,b;label\na;1,5;x,y\n", {}),
        ("m.csv", "sep=;\r\npath;label\r\na;x,y\r\n", {}),
        ("m.csv", "path^label\na^x,y\n", {"delimiter": "^"}),
        ("m.txt", "path\tlabel\na\tx,y\n", {"delimiter": "tab"}),
        ("m.csv", '\ufeff"path"; "label" ;label\na;0;x,y\n', {}),
    ],
)
def test_delimiters_of_other_tables(tmp_path: Path, name: str, text: str, settings: dict[str, Any]) -> None:
    assert read_rows(write(tmp_path / name, text), passthrough=["label"], **settings) == [{"path": "a", "label": "x,y"}]


def test_header_of_one_column_is_read_with_a_comma(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "m.csv", "path\na;b|c.png\n")) == [{"path": "a;b|c.png"}]
    assert read_rows(write(tmp_path / "m.tsv", "path\na;b,c.png\n")) == [{"path": "a;b,c.png"}]


def compress_with_arrow(data: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return bytes(sink.getvalue())


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: compress_with_arrow(data, "zstd"),
    ".lz4": lambda data: compress_with_arrow(data, "lz4"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
class TestEncodings:
    def test_csv_is_read_in_any_encoding(self, tmp_path: Path, compression: str, encoding: str) -> None:
        if encoding == "utf-16-be":
            encoded = b"\xfe\xff" + encode_csv(",").encode(encoding)
        else:
            encoded = encode_csv(",").encode(encoding)
        data = COMPRESSIONS[compression](encoded)
        for name in (f"m.csv{compression}", "wrong.csv"):
            uri = write(tmp_path / name, data)
            assert read_rows(uri, passthrough=["label"]) == ROWS
            assert read_rows(uri, 49, passthrough=["label"]) == ROWS[49:]

    def test_json_lines_are_read_in_any_encoding(self, tmp_path: Path, compression: str, encoding: str) -> None:
        text = "".join(f'{{"path": "é{number}.png", "n": {number}}}\r\n' for number in range(9))
        uri = write(tmp_path / f"m.jsonl{compression}", COMPRESSIONS[compression](text.encode(encoding)))
        expected = [{"path": f"é{number}.png", "n": number} for number in range(9)]
        assert read_rows(uri, passthrough={"n": "int8"}) == expected
        assert read_rows(uri, 4, passthrough={"n": "int8"}) == expected[4:]


def test_large_compressed_tables_are_read_in_blocks(tmp_path: Path) -> None:
    lines = "".join(f"{number}.png,{'x' * 90}{number}\n" for number in range(60_000))
    data = ("path,label\n" + lines).encode("utf-16")
    for ending in (".gz", ".zst"):
        half = len(data) // 2
        pack = COMPRESSIONS[ending]
        # Two members one after the other, as `cat a.gz b.gz` and pigz write them.
        uri = write(tmp_path / f"m.csv{ending}", pack(data[:half]) + pack(data[half:]))
        rows = read_rows(uri, 59_000, passthrough=["label"])
        assert [row["path"] for row in rows] == [f"{number}.png" for number in range(59_000, 60_000)]


def test_table_in_a_bucket_is_recognised(s3: Seaweed) -> None:
    root = s3.bucket("sources")
    s3.put(f"{root}m.csv", gzip.compress("path;label\nin/a.png;x\n".encode("utf-16")))
    assert read_rows(f"{root}m.csv", passthrough=["label"]) == [{"path": "in/a.png", "label": "x"}]


class TestNumbersOfPandas:
    def test_nan_in_an_integer_column_is_null(self, tmp_path: Path) -> None:
        table = pa.table({"path": ["a", "b", "c"], "n": pa.array([1.0, float("nan"), None])})
        pq.write_table(table, tmp_path / "m.parquet")
        rows = read_rows(f"{tmp_path}/m.parquet", passthrough={"n": "int64"})
        assert [row["n"] for row in rows] == [1, None, None]
        untyped = [row["n"] for row in read_rows(f"{tmp_path}/m.parquet", passthrough=["n"])]
        assert untyped[0] == 1.0
        assert np.isnan(untyped[1])

    @pytest.mark.parametrize("column", ["passthrough", "size"])
    def test_text_of_numbers_with_missing_ones_is_read(self, tmp_path: Path, column: str) -> None:
        uri = write(tmp_path / "m.csv", "path,n\na,3.0\nb,NaN\nc,\nd,nan\ne,7\n")
        settings = {"passthrough": {"n": "int32"}} if column == "passthrough" else {"size_column": "n"}
        source = ManifestSource(uri=uri, uri_column="path", **settings)
        (batch,) = source.refs(READER, Cursor())
        assert batch.column("n" if column == "passthrough" else "size").to_pylist() == [3, None, None, None, 7]
        with pytest.raises(InvalidJob, match=r"row 1: '3.5' in column 'n' is no int32"):
            read_rows(write(tmp_path / "b.csv", "path,n\na,3.5\n"), passthrough={"n": "int32"})

    def test_nan_of_json_lines_is_null(self, tmp_path: Path) -> None:
        uri = write(tmp_path / "m.jsonl", '{"path": "a", "n": NaN}\n{"path": "b", "n": 2.0}\n')
        assert [row["n"] for row in read_rows(uri, passthrough={"n": "uint8"})] == [None, 2]


def encode_image(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_column_of_image_bytes_says_what_to_use(tmp_path: Path, kind: str) -> None:
    image = encode_image(kind)
    columns = {"plain": pa.array([None, image]), "large": pa.array([None, image], pa.large_binary())}
    columns["datasets"] = pa.array([{"bytes": image, "path": "a.jpg"}] * 2)
    for name, column in columns.items():
        pq.write_table(pa.table({"image": column}), tmp_path / f"{name}.parquet")
        with pytest.raises(InvalidJob, match=r"column 'image' of \S+ holds the bytes of images, but batchjob reads"):
            read_rows(f"{tmp_path}/{name}.parquet", uri_column="image")


def test_paths_as_binary_are_no_images(tmp_path: Path) -> None:
    names = ["BMW/1.jpg", "GIF89/2.gif", "RIFF.webp", "II*.tif"]
    pq.write_table(pa.table({"path": pa.array(names).cast(pa.binary())}), tmp_path / "m.parquet")
    assert [row["path"] for row in read_rows(f"{tmp_path}/m.parquet")] == names


class TestRowsThatCannotBeToldApart:
    @pytest.mark.parametrize("size", [1, 100_000])
    @pytest.mark.parametrize("columns", ["path", "path,label", "label,path,more"])
    def test_open_quote_is_an_error_and_not_one_long_value(self, tmp_path: Path, columns: str, size: int) -> None:
        names = columns.split(",")
        rows = [[f"in/{number}.png" if name == "path" else "x" for name in names] for number in range(size + 2)]
        text = "\n".join(",".join(row) for row in [names, *rows]) + "\n"
        assert len(read_rows(write(tmp_path / "m.csv", text))) == size + 2
        rows[size][-1] = '"' + rows[size][-1]
        text = "\n".join(",".join(row) for row in [names, *rows]) + "\n"
        with pytest.raises(InvalidJob, match="a quote is opened and not closed"):
            read_rows(write(tmp_path / "m.csv", text))

    @pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n", "\r", "\n\r\n\n"])
    def test_end_of_a_file_is_no_row(self, tmp_path: Path, end: str) -> None:
        for text, count in (("path", 0), ("path\nin/a.png", 1), ('path\nin/a.png\n"in/b.png"', 2)):
            for encoding in ("utf-8", "utf-16"):
                uri = write(tmp_path / "m.csv", (text + end).encode(encoding))
                assert len(read_rows(uri)) == count
                assert len(read_rows(uri, 1)) == max(0, count - 1)

    def test_row_with_a_delimiter_too_many_says_what_to_do(self, tmp_path: Path) -> None:
        uri = write(tmp_path / "m.csv", "path,label\nin/a.png,x,y\n")
        with pytest.raises(InvalidJob, match=r"Expected 2 columns, got 3.*into quotes"):
            read_rows(uri)

    def test_open_quote_before_much_text_says_what_to_do(self, tmp_path: Path) -> None:
        uri = write(tmp_path / "m.csv", 'path,label\nin/a.png,"x\n' + "in/b.png,y\n" * 200_000)
        with pytest.raises(InvalidJob, match="close the quote"):
            read_rows(uri)
