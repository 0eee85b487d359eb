"""Tables with a log (Delta, Iceberg, Hudi, Spark streaming) are refused as manifests; folders like them are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchjob.errors import InvalidJob
from batchjob.sources.manifest import ManifestSource
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.reader import Reader
from batchjob.types import Cursor
from tests.support.seaweed import Seaweed

READER = Reader()
DELTA = ("_delta_log/00000000000000000000.json", "part-0.csv", "dt=1/hour=2/part-1.csv", "notes/x.csv")
ICEBERG = ("metadata/00000-1f.metadata.json", "data/dt=1/a.csv", "data/b.csv")
HUDI = (".hoodie/hoodie.properties", "2024/01/a.csv", "2024/01/.hoodie_partition_metadata")
SPARK = ("_spark_metadata/0", "part-0.csv")


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("path\na.jpg\n" if name.endswith(".csv") else "{}")
    return folder


def read_uris(uri: str) -> list[str]:
    source = ManifestSource(uri=uri, uri_column="path", format="csv")
    return [uri for batch in source.refs(READER, Cursor()) for uri in batch.column("uri").to_pylist()]


@pytest.mark.parametrize(
    ("files", "uri", "kind", "table"),
    [
        (DELTA, "t", "Delta", "t"),
        (DELTA, "t/", "Delta", "t"),
        (DELTA, "t/dt=1/hour=2/", "Delta", "t"),
        (DELTA, "t/**/*.csv", "Delta", "t"),
        (DELTA, "t/dt=*/*/*.csv", "Delta", "t"),
        (DELTA, "**/*.csv", "Delta", "t"),
        (DELTA, "*/part-*.csv", "Delta", "t"),
        (ICEBERG, "t/data", "Iceberg", "t"),
        (ICEBERG, "t/data/dt=1", "Iceberg", "t"),
        (ICEBERG, "t/data/**/*.csv", "Iceberg", "t"),
        (ICEBERG, "*/data/*.csv", "Iceberg", "t"),
        (HUDI, "t/2024/01/", "Hudi", "t/2024/01"),
        (HUDI, "t/**/*.csv", "Hudi", "t"),
        (HUDI, "*/*/*/*.csv", "Hudi", "t"),
        (SPARK, "t", "Spark streaming", "t"),
    ],
)
def test_table_with_a_log_is_refused(tmp_path: Path, files: tuple[str, ...], uri: str, kind: str, table: str) -> None:
    write_files(tmp_path / "t", *files)
    with pytest.raises(InvalidJob) as caught:
        read_uris(f"{tmp_path}/{uri}")
    message = caught.value.message
    assert message.startswith(f"input.uri {tmp_path}/{uri}: {tmp_path}/{table}/ is a {kind} table, whose log says")
    assert "export it to plain Parquet (in " in message
    with pytest.raises(InvalidJob, match=f"is a {kind} table"):
        ManifestSource(uri=f"{tmp_path}/{uri}", uri_column="path", format="csv").check(READER)


def test_single_file_of_a_table_is_read(tmp_path: Path) -> None:
    write_files(tmp_path / "t", *DELTA)
    assert read_uris(f"{tmp_path}/t/part-0.csv") == ["a.jpg"]


@pytest.mark.parametrize(
    ("files", "uri"),
    [
        (("metadata/notes.json", "a.csv"), "t"),
        (("metadata/a.csv",), "t/*/*.csv"),
        (("delta_log/0.json", "a.csv"), "t/**/*.csv"),
        ((*DELTA, "../plain/a.csv"), "plain"),
        ((*DELTA, "../plain/a.csv"), "p*/*.csv"),
        (("dt=1/a.csv", "data/metadata/x.csv"), "t/dt=1"),
    ],
)
def test_folders_without_a_log_are_read(tmp_path: Path, files: tuple[str, ...], uri: str) -> None:
    write_files(tmp_path / "t", *files)
    assert read_uris(f"{tmp_path}/{uri}") == ["a.jpg"]


def test_empty_log_folder_is_no_table(tmp_path: Path) -> None:
    write_files(tmp_path / "t", "a.csv")
    (tmp_path / "t/_delta_log").mkdir()
    assert read_uris(f"{tmp_path}/t/**") == ["a.jpg"]


def test_looking_for_a_log_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "t", "a.csv")
    listed: list[str] = []

    def count(reader: Reader, uri: str, *args: Any, **keywords: Any) -> Iterator[ObjectInfo]:
        listed.append(uri)
        return list_objects(reader, uri, *args, **keywords)

    list_objects = Reader.list
    monkeypatch.setattr(Reader, "list", count)
    source = ManifestSource(uri=f"{tmp_path}/t", uri_column="path", format="csv")
    source.check(READER)
    assert len(listed) > 1
    listed.clear()
    assert source.version(READER)
    assert [info.uri for info in source.list_files(READER)] == [f"{tmp_path}/t/a.csv"]
    assert listed == [f"{tmp_path}/t/"] * 2


@pytest.mark.parametrize("uri", ["t", "t/dt=1/hour=2", "t/**/*.csv", "*/dt=*/*/*.csv"])
def test_table_in_a_bucket_is_refused(s3: Seaweed, tmp_path: Path, uri: str) -> None:
    root = s3.bucket("sources")
    s3.put_tree(write_files(tmp_path / "t", *DELTA), f"{root}lake/t")
    with pytest.raises(InvalidJob, match=f"{root}lake/t/ is a Delta table"):
        read_uris(f"{root}lake/{uri}")
    assert read_uris(f"{root}lake/t/part-0.csv") == ["a.jpg"]
