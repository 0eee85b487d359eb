"""Tables with a log of their files (Delta Lake, Iceberg, Hudi): found around a manifest's files, and refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchjob.concurrency import parallel_map
from batchjob.errors import InvalidJob, NotFound, Unavailable
from batchjob.sources.locations import InputLocation, child_uri, name_slice
from batchjob.storage.objects import ObjectInfo
from batchjob.uris import split_chain

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["LakeTable", "is_log_folder", "refuse_lake_tables"]

# Kind of table -> folder of its log, and the ending of a file in it that tells it from other folders of that name.
_LOGS = {
    "Delta": ("_delta_log", ""),
    "Hudi": (".hoodie", ""),
    "Spark streaming": ("_spark_metadata", ""),
    "Iceberg": ("metadata", ".metadata.json"),
}
_HUDI_PARTITION_FILE = ".hoodie_partition_metadata"
_EXPORTS = {
    "Delta": "in DuckDB: COPY (FROM delta_scan('{}')) TO 'manifest.parquet'",
    "Iceberg": "in DuckDB: COPY (FROM iceberg_scan('{}')) TO 'manifest.parquet'",
}
# Folders of partitions, and the folder in which Iceberg keeps its files: the log is above them.
_BELOW_TABLE = re.compile(r"(?:[^/=]+=[^/]*/)*$")
_DATA_FOLDER = "/data/"
_MAX_METADATA_FILES = 10_000  # of a folder `metadata/` that are looked at


@dataclass(frozen=True)
class LakeTable:
    """A folder whose log says which of its files count.

    Attributes:
        kind: Name of the table format.
        folder: URI of the table, with a final `/`.
    """

    kind: str
    folder: str


def is_log_folder(folder: str) -> bool:
    """Return True for the name of a folder in which a table may keep its log: `_delta_log`, `.hoodie`, `metadata`."""
    return any(folder == log_folder for log_folder, _ in _LOGS.values())


def refuse_lake_tables(
    reader: Reader, location: InputLocation, files: Iterable[ObjectInfo], log_folders: Iterable[str]
) -> None:
    """Check that the files of a folder or glob belong to no table whose log says which of them count.

    A single file is read as it is: whoever names it has chosen it.

    Args:
        reader: Reader with the job's storage options.
        location: Folder or glob of the manifest.
        files: Files that would be read.
        log_folders: Folders relative to the location's folder that its listing met, and that may hold a log.

    Raises:
        InvalidJob: A file lies in such a table: it would be read with the rows of removed files.
    """
    if location.file is not None:
        return
    table = _find_around(reader, location.folder) or _find_below(reader, location, files, log_folders)
    if table is None:
        return
    export = _EXPORTS.get(table.kind, "in Spark: df.write.parquet").format(table.folder.rstrip("/"))
    raise InvalidJob(
        f"input.uri {location.uri}: {table.folder} is a {table.kind} table, whose log says which of its files count; "
        f"export it to plain Parquet ({export}), or name one file of it"
    )


def _find_around(reader: Reader, folder: str) -> LakeTable | None:
    """Find the table that a folder is, or whose partition it is."""
    head, chain = split_chain(folder)
    root = _BELOW_TABLE.sub("", head)
    candidates = [head, root, *([root.removesuffix("data/")] if root.endswith(_DATA_FOLDER) else [])]
    return _find_first(reader, [candidate + chain for candidate in candidates])


def _find_below(
    reader: Reader, location: InputLocation, files: Iterable[ObjectInfo], log_folders: Iterable[str]
) -> LakeTable | None:
    """Find a table below a glob's folder: a folder that holds both a log, such as `t/_delta_log/`, and files."""
    names = [file.uri[name_slice(location.folder)] for file in files]
    tables = {folder[: folder.rfind("/", 0, -1) + 1] for folder in log_folders}
    used = sorted(table for table in tables if any(name.startswith(table) for name in names))
    return _find_first(reader, [child_uri(location.folder, table) for table in used])


def _find_first(reader: Reader, folders: Iterable[str]) -> LakeTable | None:
    """Return the first of these folders that is a table. The requests run side by side."""
    probes = [LakeTable(kind, folder) for folder in dict.fromkeys(folders) for kind in _LOGS]
    answers = list(parallel_map(lambda probe: _is_there(reader, probe), probes))
    return next((probe for probe, is_there in zip(probes, answers, strict=True) if is_there), None)


def _is_there(reader: Reader, table: LakeTable) -> bool:
    """Return True if a folder holds a table's log; False also if this user may read the files, but not look around."""
    log_folder, ending = _LOGS[table.kind]
    log = child_uri(table.folder, f"{log_folder}/")
    with suppress(NotFound, Unavailable):
        found = itertools.islice(reader.list(log), _MAX_METADATA_FILES)
        if any(one.uri[name_slice(log)].endswith(ending) for one in found):
            return True
    if table.kind == "Hudi":  # It marks its partitions, whose names say nothing.
        with suppress(NotFound, Unavailable):
            reader.stat(child_uri(table.folder, _HUDI_PARTITION_FILE))
            return True
    return False
