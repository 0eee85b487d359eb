"""Rows, schema and Parquet file of one part. Every common reader opens it with one plain call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchjob.errors import BatchjobError, InvalidJob
from batchjob.output.part_writer import PartWriter, build_rows
from batchjob.output.provenance import PartFooter
from batchjob.output.schema import build_row_schema
from batchjob.types import ErrorRecord, ImageInfo, ImageRef, Shard, ShardKey

TOP_K_TYPE = pa.list_(pa.struct([("label_id", pa.int32()), ("label", pa.string()), ("score", pa.float32())]))
VECTOR_TYPE = pa.list_(pa.float32(), 4)
TASK_FIELDS = [
    pa.field("label_id", pa.int32()),
    pa.field("label", pa.string()),
    pa.field("score", pa.float32()),
    pa.field("top_k", TOP_K_TYPE),
    pa.field("embedding", VECTOR_TYPE),
]
PASSTHROUGH_FIELDS = [pa.field("sku", pa.string()), pa.field("price", pa.float64())]
SCHEMA = build_row_schema(PASSTHROUGH_FIELDS, TASK_FIELDS)
EMPTY_FILE = ErrorRecord("decode", "empty", "the file\nis empty")


def make_shard(count: int, first: int = 0) -> Shard:
    refs = tuple(ImageRef(first + n, f"u{first + n}", f"/lake/u{first + n}", 10, "planned") for n in range(count))
    table = pa.table(
        {"sku": [f"s{n}" for n in range(count)], "price": [n / 2 for n in range(count)]}, pa.schema(PASSTHROUGH_FIELDS)
    )
    return Shard(ShardKey(0, "0" * 16, count, 0, 0), refs, table)


def make_columns(count: int) -> list[pa.Array]:
    vectors = pa.array(np.arange(count * 4, dtype=np.float32))
    return [
        pa.array(range(count), pa.int32()),
        pa.array([f"label {n % 3}" for n in range(count)]),
        pa.array([n / 10 for n in range(count)], pa.float32()),
        pa.array([[{"label_id": n, "label": "a", "score": 0.5}] * 2 for n in range(count)], TOP_K_TYPE),
        pa.FixedSizeListArray.from_arrays(vectors, type=VECTOR_TYPE),
    ]


def make_batch(
    shard: Shard,
    start: int = 0,
    count: int | None = None,
    undecoded: Sequence[int] = (),
    unpredicted: Sequence[int] = (),
) -> pa.RecordBatch:
    """Build rows from `start` on; `undecoded` counts among all of them, `unpredicted` among the decoded ones."""
    count = len(shard.refs) - start if count is None else count
    facts = [ImageInfo(error=EMPTY_FILE) if n in undecoded else ImageInfo(f"e{n}", 640, 480) for n in range(count)]
    good = count - len(undecoded)
    nan = ErrorRecord("predict", "not_finite", "NaN")
    return build_rows(
        SCHEMA,
        shard=shard,
        start=start,
        image_infos=facts,
        columns=make_columns(good) if good else [],
        error_records=[nan if n in unpredicted else None for n in range(good)],
        run_id="run",
        model_id="model",
    )


def make_footer(writer: PartWriter, **other: Any) -> PartFooter:
    given: dict[str, Any] = {
        "plan": "p", "shard": "s", "index": 0, "attempt": "a", "revision": 0, "fingerprint": "f", "model": "m",
        "rows": writer.rows, "failed": writer.failed, "errors": writer.errors, "seconds": {"fetch": 0.5},
        "versions": {"torch": "2"},
    }  # fmt: skip
    return PartFooter(**given | other)


def write_part(path: Path, *batches: pa.RecordBatch, **options: Any) -> PartWriter:
    writer = PartWriter(path, SCHEMA, **options)
    for each in batches:
        writer.add(each)
    writer.close(make_footer(writer))
    return writer


def test_columns_are_in_the_documented_order() -> None:
    assert SCHEMA.names == [
        "position", "uri", "sku", "price", "etag", "width", "height", "label_id", "label", "score", "top_k",
        "embedding", "run_id", "model_id", "error_stage", "error_type", "error_message",
    ]  # fmt: skip
    assert build_row_schema([pa.field("id", pa.int64()), *PASSTHROUGH_FIELDS], TASK_FIELDS, has_id=True).names[:4] == [
        "position", "id", "uri", "sku",
    ]  # fmt: skip
    assert SCHEMA.field("position").type == pa.int64()
    assert all(not pa.types.is_null(field.type) for field in SCHEMA)


def test_good_rows_and_error_rows_are_in_plan_order() -> None:
    rows = make_batch(make_shard(9, first=100), start=3, count=5, undecoded=[0, 3], unpredicted=[1]).to_pylist()
    assert [row["position"] for row in rows] == [103, 104, 105, 106, 107]
    assert [row["uri"] for row in rows] == ["u103", "u104", "u105", "u106", "u107"]
    assert [row["sku"] for row in rows] == ["s3", "s4", "s5", "s6", "s7"]
    assert [row["etag"] for row in rows] == [None, "e1", "e2", None, "e4"]
    assert [row["error_type"] for row in rows] == ["empty", None, "not_finite", "empty", None]
    assert [row["label_id"] for row in rows] == [None, 0, None, None, 2]
    assert [row["embedding"] for row in rows] == [None, [0, 1, 2, 3], None, None, [8, 9, 10, 11]]
    assert [row["top_k"] and len(row["top_k"]) for row in rows] == [None, 2, None, None, 2]
    assert rows[0]["error_message"] == "the file is empty"
    assert (rows[2]["width"], rows[2]["height"]) == (640, 480)
    assert {row["run_id"] for row in rows} == {"run"}


def test_batch_without_predictions_gives_error_rows() -> None:
    rows = make_batch(make_shard(3), undecoded=[0, 1, 2])
    assert rows.schema == SCHEMA
    assert rows.column("embedding").null_count == 3


@pytest.mark.parametrize("count", [0, 1, 300])
def test_common_readers_open_a_part_with_one_call(tmp_path: Path, count: int) -> None:
    path = tmp_path / "predictions" / "part-0000000-abc.parquet"
    path.parent.mkdir()
    of = make_shard(count)
    parts = [make_batch(of, start, min(64, count - start), undecoded=[0]) for start in range(0, count, 64)]
    writer = write_part(path, *parts, row_group_rows=100)
    bad = len(parts)
    assert (writer.rows, writer.failed) == (count, bad)
    for folder in (path, path.parent):
        table = pq.read_table(folder)
        assert table.schema.equals(SCHEMA)
        assert table.column("position").to_pylist() == list(range(count))
        assert table.to_pylist() == [row for part in parts for row in part.to_pylist()]
        frame = pd.read_parquet(folder)
        assert len(frame) == count
        assert frame["error_type"].count() == bad
    assert ds.dataset(path.parent).count_rows() == count
    polar = pl.read_parquet(path.parent / "*.parquet")
    assert polar.height == count == pl.read_parquet(path.parent).height
    assert polar["embedding"].null_count() == bad == polar["top_k"].null_count()
    assert polar.schema["embedding"] == pl.Array(pl.Float32, 4)
    counted = duckdb.execute(
        f"select count(*), count(label), sum(len(embedding)) from '{path.parent}/*.parquet'"
    ).fetchall()
    assert counted == [(count, count - bad, 4 * (count - bad) or None)]
    assert pq.read_metadata(path).num_row_groups == (3 if count == 300 else count)


def test_footer_is_read_back_and_ignores_later_fields(tmp_path: Path) -> None:
    writer = write_part(tmp_path / "part", make_batch(make_shard(5), undecoded=[1, 3], unpredicted=[0]))
    assert writer.errors == {"decode/empty": 2, "predict/not_finite": 1}
    assert writer.examples == {"decode/empty": "u1: the file is empty", "predict/not_finite": "u0: NaN"}
    footer = pq.read_metadata(tmp_path / "part").metadata
    assert PartFooter.from_json(footer[b"batchjob"]) == make_footer(writer)
    said = json.loads(footer[b"batchjob"])
    assert said["errors"] == {"decode/empty": 2, "predict/not_finite": 1}
    assert PartFooter.from_json(json.dumps(said | {"of a later version": 1})) == make_footer(writer)


def test_encodings_are_common_and_dictionaries_only_for_repeated_values(tmp_path: Path) -> None:
    write_part(tmp_path / "part", make_batch(make_shard(200)))
    group = pq.read_metadata(tmp_path / "part").row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert {name for name, column in columns.items() if column.has_dictionary_page} == {
        "sku", "width", "height", "label_id", "label", "top_k.list.element.label_id", "top_k.list.element.label",
        "run_id", "model_id", "error_stage", "error_type", "error_message",
    }  # fmt: skip
    assert {encoding for column in columns.values() for encoding in column.encodings} <= {
        "PLAIN",
        "RLE",
        "RLE_DICTIONARY",
    }
    assert not columns["embedding.list.element"].is_stats_set
    assert columns["position"].statistics.max == 199


def test_wide_rows_make_smaller_row_groups(tmp_path: Path) -> None:
    wide = build_row_schema([], [pa.field("embedding", pa.list_(pa.float32(), 250_000))])
    writer = PartWriter(tmp_path / "part", wide)
    for start in range(0, 120, 40):
        values = pa.FixedSizeListArray.from_arrays(
            pa.array(np.zeros(40 * 250_000, np.float32)), type=wide.field("embedding").type
        )
        writer.add(
            build_rows(
                wide,
                shard=Shard(make_shard(120).key, make_shard(120).refs, pa.table({"none": [0] * 120}).select([])),
                start=start,
                image_infos=[ImageInfo()] * 40,
                columns=[values],
                error_records=[None] * 40,
                run_id="r",
                model_id="m",
            )
        )
    writer.close(make_footer(writer))
    assert pq.read_metadata(tmp_path / "part").num_row_groups == 2


def test_batch_with_another_schema_is_refused(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "part", SCHEMA)
    other = make_batch(make_shard(2))
    for odd in (
        other.drop_columns(["sku"]),
        other.set_column(2, pa.field("sku", pa.large_string()), other.column("sku").cast(pa.large_string())),
    ):
        with pytest.raises(BatchjobError, match="another schema"):
            writer.add(odd)
    assert writer.rows == 0


def test_unordered_or_repeated_rows_are_refused(tmp_path: Path) -> None:
    of = make_shard(8)
    for second in (make_batch(of, 0, 4), make_batch(of, 3, 2)):
        with PartWriter(tmp_path / "part", SCHEMA) as writer:
            writer.add(make_batch(of, 0, 4))
            with pytest.raises(BatchjobError, match="plan order"):
                writer.add(second)


def test_wrong_counts_and_lengths_are_refused(tmp_path: Path) -> None:
    for wrong in ({"rows": 3}, {"failed": 1}, {"errors": {"decode/empty": 1}}):
        with PartWriter(tmp_path / "part", SCHEMA) as writer:
            writer.add(make_batch(make_shard(2)))
            with pytest.raises(BatchjobError, match="provenance says"):
                writer.close(make_footer(writer, **wrong))
    given: dict[str, Any] = {"shard": make_shard(2), "start": 0, "run_id": "r", "model_id": "m"}
    with pytest.raises(BatchjobError, match="1 predictions came for 2 images"):
        build_rows(SCHEMA, image_infos=[ImageInfo()] * 2, columns=make_columns(1), error_records=[None], **given)
    with pytest.raises(BatchjobError, match="do not lie in a shard of 2"):
        build_rows(SCHEMA, image_infos=[ImageInfo()] * 3, columns=make_columns(3), error_records=[None] * 3, **given)
    with pytest.raises(BatchjobError, match="the task gave 2 columns, its schema has 5"):
        build_rows(
            SCHEMA, image_infos=[ImageInfo()] * 2, columns=make_columns(2)[:2], error_records=[None] * 2, **given
        )


def test_column_of_null_type_is_refused(tmp_path: Path) -> None:
    for kind in (pa.null(), pa.list_(pa.null()), pa.struct([("a", pa.null())])):
        with pytest.raises(InvalidJob, match="'odd' holds only nulls"):
            build_row_schema([pa.field("odd", kind)], TASK_FIELDS)
        with pytest.raises(InvalidJob, match="odd"):
            PartWriter(tmp_path / "part", pa.schema([pa.field("odd", kind)]))


@pytest.mark.parametrize(
    ("name", "output", "words"),
    [
        ("label", "", "two columns 'label'"),
        ("URI", "", "two columns 'URI'"),
        ("dt", "s3://lake/out/dt=2026-11-19/", "column 'dt' clashes with the folder dt=… of s3://lake/out"),
        ("x", "/lake/Run_ID=7", "our column 'run_id' clashes with the folder Run_ID=…"),
    ],
)
def test_clashing_column_names_are_refused(name: str, output: str, words: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        build_row_schema([pa.field(name, pa.string())], TASK_FIELDS, output_uri=output)
    assert words in caught.value.message


def test_error_message_becomes_one_line_of_valid_text() -> None:
    fault = ErrorRecord("transform", "ValueError", "bad \udcff byte\n" + "x" * 5000)
    rows = build_rows(
        SCHEMA,
        shard=make_shard(1),
        start=0,
        image_infos=[ImageInfo(error=fault)],
        columns=[],
        error_records=[],
        run_id="r",
        model_id="m",
    )
    message = rows.column("error_message")[0].as_py()
    assert message.startswith(r"bad \udcff byte x")
    assert len(message) == 1000
