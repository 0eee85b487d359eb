"""Committed rows of an output as a pyarrow dataset, read through the store's own client, credentials and retries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import pyarrow as pa
from pyarrow import dataset, fs

from batchjob.errors import InvalidJob, NotFound
from batchjob.output.commit import list_parts
from batchjob.storage.store import Store
from batchjob.uris import is_local, local_path

__all__ = ["open_rows"]


def open_rows(store: Store) -> dataset.Dataset:
    """Open the committed rows as a pyarrow dataset, read through this store with its options and its retries.

    Raises:
        InvalidJob: No row is committed yet.
        Unavailable: The store cannot be reached.
    """
    names = sorted(list_parts(store))
    if not names:
        raise InvalidJob(f"{store.uri}: no rows are committed yet; `batchjob run` makes them")
    if is_local(store.uri):
        return dataset.dataset([os.path.join(local_path(store.uri), name) for name in names], format="parquet")  # noqa: PTH118
    return dataset.dataset(names, format="parquet", filesystem=fs.PyFileSystem(_StoreFileSystem(store)))


class _StoreFileSystem(fs.FileSystemHandler):  # type: ignore[misc]
    """Read-only file system of the objects of one output; paths are its keys. For `pyarrow.fs.PyFileSystem`.

    Args:
        store: The output.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StoreFileSystem) and self._store.uri == other._store.uri

    def __hash__(self) -> int:
        return hash(self._store.uri)

    def get_type_name(self) -> str:
        return "batchjob"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: Sequence[str]) -> list[fs.FileInfo]:
        return [self._describe(path) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        prefix = f"{selector.base_dir.rstrip('/')}/" if selector.base_dir else ""
        return [fs.FileInfo(info.uri, fs.FileType.File, size=info.size) for info in self._store.list(prefix)]

    def open_input_file(self, path: str) -> pa.PythonFile:
        try:
            return pa.PythonFile(self._store.open(path), mode="r")
        except NotFound as error:
            raise FileNotFoundError(path) from error

    def open_input_stream(self, path: str) -> pa.PythonFile:
        return self.open_input_file(path)

    def _describe(self, path: str) -> fs.FileInfo:
        try:
            return fs.FileInfo(path, fs.FileType.File, size=self._store.stat(path).size)
        except NotFound:
            return fs.FileInfo(path, fs.FileType.NotFound)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise OSError(f"{self._store.uri} is read only here")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _refuse
    move = copy_file = open_output_stream = open_append_stream = _refuse
