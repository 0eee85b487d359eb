"""A store whose every verb is a step on a stopwatch, so that one which never answers is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from batchjob.records import Blob, Stat
from batchjob.stopwatch import Stopwatch
from batchjob.storage import Store, upload_seconds

__all__ = ["AttendedStore"]

_TRIES = 2


class AttendedStore:
    """The same store. Its clients wait for one that is away, but not for ever; a file system may keep a call so long.

    Args:
        store: that is asked.
        stopwatch: shows for how long.
    """

    def __init__(self, store: Store, stopwatch: Stopwatch) -> None:
        self._store, self._stopwatch, self.uri = store, stopwatch, store.uri

    def read(self, key: str) -> Blob:
        with self._stopwatch.step(f"the reading of {self.uri}/{key}", storage=True):
            return self._store.read(key)

    def read_tail(self, key: str, size: int) -> bytes:
        with self._stopwatch.step(f"the reading of {self.uri}/{key}", storage=True):
            return self._store.read_tail(key, size)

    def read_head(self, key: str, size: int) -> bytes:
        with self._stopwatch.step(f"the reading of {self.uri}/{key}", storage=True):
            return self._store.read_head(key, size)

    def open(self, key: str) -> BinaryIO:
        with self._stopwatch.step(f"the opening of {self.uri}/{key}", storage=True):
            return self._store.open(key)

    def stat(self, key: str) -> Stat:
        with self._stopwatch.step(f"a look at {self.uri}/{key}", storage=True):
            return self._store.stat(key)

    def list(self, prefix: str) -> Iterator[Stat]:
        step = partial(self._stopwatch.step, f"the listing of {self.uri}/{prefix}", storage=True)
        with step():
            listed = self._store.list(prefix)
        while True:
            with step():
                found = next(listed, None)
            if found is None:
                return
            yield found

    def put_if_absent(self, key: str, body: bytes | Path) -> Stat:
        with self._writing(key, body):
            return self._store.put_if_absent(key, body)

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> Stat:
        with self._writing(key, body):
            return self._store.replace_if_match(key, body, version)

    def delete(self, key: str) -> None:
        with self._stopwatch.step(f"the deletion of {self.uri}/{key}", storage=True):
            self._store.delete(key)

    def delete_if_match(self, key: str, version: str) -> None:
        with self._stopwatch.step(f"the deletion of {self.uri}/{key}", storage=True):
            self._store.delete_if_match(key, version)

    def _writing(self, key: str, body: bytes | Path) -> AbstractContextManager[None]:
        """An upload shows no life before it is through, and its client may have to try it again."""
        size = body.stat().st_size if isinstance(body, Path) else len(body)
        extra = _TRIES * (upload_seconds(size) - upload_seconds(0))
        return self._stopwatch.step(f"the writing of {self.uri}/{key}", storage=True, extra=extra)
