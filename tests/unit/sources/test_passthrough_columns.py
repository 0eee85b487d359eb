"""Columns that go into the output: under another name, and from the folders of a partitioned table."""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjob.driver import driver
from batchjob.driver.progress import NoProgress
from batchjob.errors import InvalidJob
from batchjob.plan.chunks import read_chunks
from batchjob.plan.head import read_current_head
from batchjob.plan.reader import PlanReader
from batchjob.sources.manifest import ManifestSource
from batchjob.storage.reader import Reader
from batchjob.storage.store import open_store
from batchjob.types import Cursor
from tests.support.scripted_pool import make_job
from tests.support.seaweed import Seaweed

READER = Reader()


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def read_columns(uri: str, passthrough: Any, after: int = 0, **settings: Any) -> dict[str, list[Any]]:
    source = ManifestSource(uri=uri, uri_column="path", passthrough=passthrough, **settings)
    table = pa.Table.from_batches(list(source.refs(READER, Cursor(after))))
    assert [table.schema.field(field.name) for field in source.fields(READER)] == source.fields(READER)
    columns: dict[str, list[Any]] = table.drop_columns(["uri", "location", "size", "etag"]).to_pydict()
    return columns


class TestRenaming:
    @pytest.fixture
    def uri(self, tmp_path: Path) -> str:
        return write(tmp_path / "m.csv", "path,label,width,size\na.png,0,40,1\nb.png,1,50,2\n")

    def test_columns_get_other_names_and_types(self, uri: str) -> None:
        rules: Any = {"label": {"as": "label_true", "type": "int64"}, "width": {"as": "w"}, "size": {"as": "bytes"}}
        expected: dict[str, list[Any]] = {"label_true": [0, 1], "w": ["40", "50"], "bytes": ["1", "2"]}
        assert read_columns(uri, rules) == expected
        assert read_columns(uri, rules, after=1) == {name: values[1:] for name, values in expected.items()}
        assert read_columns(uri, {"label": {}, "width": "int8"}) == {"label": ["0", "1"], "width": [40, 50]}

    def test_missing_column_is_named_as_in_the_manifest(self, uri: str) -> None:
        with pytest.raises(
            InvalidJob, match=r"input.passthrough: \S+ has no column 'lable' \(did you mean 'label'\?\)"
        ):
            read_columns(uri, {"lable": {"as": "truth"}})

    @pytest.mark.parametrize("column", ["label", "width", "score", "model_id"])
    def test_clash_with_a_column_of_the_output_says_how_to_rename(self, tmp_path: Path, column: str) -> None:
        write(tmp_path / "m.csv", f"path,{column}\na.png,0\n")
        source: dict[str, Any] = {"type": "manifest", "uri": "m.csv", "uri_column": "path"}
        job = make_job(tmp_path, ["a.png"], input={**source, "passthrough": [column]}, task={"type": "classification"})
        if column in {"width", "model_id"}:
            with pytest.raises(InvalidJob, match=rf"rename it, as in passthrough: {{{column}: {{as: my_{column}}}}}"):
                driver.make_plan(job, allow_empty=False, progress=NoProgress())
        rules = {column: {"as": f"my_{column}", "type": "int64"}}
        task = {"type": "classification", "truth": f"my_{column}"}
        job = make_job(tmp_path, ["a.png"], input={**source, "passthrough": rules}, task=task)
        driver.make_plan(job, allow_empty=False, progress=NoProgress())
        store = open_store(job.output.uri, job.storage)
        _, head = read_current_head(store)
        assert head is not None
        (shard,) = [
            PlanReader(store, head).read_shard(key) for chunk in read_chunks(store, head) for key in chunk.shards
        ]
        assert shard.passthrough.to_pydict() == {f"my_{column}": [0]}


class TestHiveFolders:
    def test_folders_are_columns_where_the_job_names_them(self, tmp_path: Path) -> None:
        for day in ("2024-01-01", "2024-01-02", "__HIVE_DEFAULT_PARTITION__"):
            write(tmp_path / f"m/dt={day}/label=caf%C3%A9%2F1/p.csv", "path\na.png\nb.png\n")
        uri = f"{tmp_path}/m/**/*.csv"
        days = ["2024-01-01"] * 2 + ["2024-01-02"] * 2 + [None] * 2
        columns: dict[str, list[Any]] = {"dt": days, "label": ["café/1"] * 6}
        assert read_columns(uri, ["dt", "label"]) == columns
        for after in range(7):
            assert read_columns(uri, ["dt", "label"], after) == {name: rows[after:] for name, rows in columns.items()}
        dates = [None if day is None else datetime.date.fromisoformat(day) for day in days]
        assert read_columns(uri, {"dt": {"as": "day", "type": "date32"}}) == {"day": dates}
        assert read_columns(uri, []) == {}
        assert read_columns(uri, ["label"], id_column="dt") == {"id": days, "label": ["café/1"] * 6}

    @pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
    def test_folder_above_a_single_file_is_a_column(self, tmp_path: Path, ending: str) -> None:
        path = tmp_path / f"year=2024/m.{ending}"
        write(path, '{"path": "a.png"}\n' if ending == "jsonl" else "path\na.png\n")
        if ending == "parquet":
            pq.write_table(pa.table({"path": ["a.png"]}), path)
        assert read_columns(str(path), {"year": "int16"}) == {"year": [2024]}

    def test_column_that_agrees_with_its_folder_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "n=1").mkdir()
        pq.write_table(pa.table({"path": ["a", "b"], "n": pa.array([1, None], pa.int32())}), tmp_path / "n=1/m.parquet")
        assert read_columns(f"{tmp_path}/n=1/m.parquet", ["n"]) == {"n": [1, 1]}
        write(tmp_path / "n=1/m.jsonl", '{"path": "a", "n": 1}\n{"path": "b"}\n')
        assert read_columns(f"{tmp_path}/n=1/m.jsonl", {"n": "int64"}) == {"n": [1, 1]}

    @pytest.mark.parametrize("folder", ["n=2", "n=__HIVE_DEFAULT_PARTITION__"])
    def test_column_that_clashes_with_its_folder_is_an_error(self, tmp_path: Path, folder: str) -> None:
        uri = write(tmp_path / folder / "m.csv", "path,n\na,\nb,1\n")
        with pytest.raises(InvalidJob) as caught:
            read_columns(uri, ["n"])
        assert caught.value.message == (
            f"{uri}, row 2: column 'n' says 1, its folder {folder}; rename one of them, or leave it out of "
            "input.passthrough"
        )
        assert read_columns(uri, []) == {}

    def test_value_that_does_not_fit_its_type_is_an_error(self, tmp_path: Path) -> None:
        uri = write(tmp_path / "n=x/m.csv", "path\na\n")
        with pytest.raises(InvalidJob, match=r"'x' in column 'n' is no int64"):
            read_columns(uri, {"n": "int64"})

    def test_missing_column_lists_folders_too(self, tmp_path: Path) -> None:
        uri = write(tmp_path / "label=cat/m.csv", "path\na\n")
        with pytest.raises(InvalidJob, match=r"no column 'lable' \(did you mean 'label'\?\); it has: path, label"):
            read_columns(uri, ["lable"])
        with pytest.raises(InvalidJob, match=r"input.uri_column: \S+ has no column 'label'"):
            ManifestSource(uri=uri, uri_column="label").check(READER)

    def test_file_outside_the_folders_is_an_error(self, tmp_path: Path) -> None:
        write(tmp_path / "m/label=cat/a.csv", "path\na\n")
        write(tmp_path / "m/z.csv", "path\nb\n")
        with pytest.raises(InvalidJob, match=r"z.csv has no column 'label'"):
            read_columns(f"{tmp_path}/m/**/*.csv", ["label"])

    @pytest.mark.parametrize("name", [b"label=\xff", b"label=%FF"])
    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
    def test_folder_that_is_not_utf8_is_an_error(self, tmp_path: Path, name: bytes) -> None:
        folder = os.fsencode(tmp_path) + b"/m/" + name
        Path(os.fsdecode(folder)).mkdir(parents=True)
        write(Path(os.fsdecode(folder)) / "a.csv", "path\na\n")
        with pytest.raises(InvalidJob, match=r"its folder label=… is not named in UTF-8"):
            read_columns(f"{tmp_path}/m/*/*.csv", ["label"])

    def test_folders_of_a_bucket_are_columns(self, s3: Seaweed) -> None:
        root = s3.bucket("sources")
        for label in ("cat", "a%20b"):
            s3.put(f"{root}m/label={label}/p.csv", b"path\na.png\n")
        assert read_columns(f"{root}m/*/*.csv", ["label"]) == {"label": ["a b", "cat"]}
