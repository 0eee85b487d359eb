"""Store whose calls are steps on a watchdog, so that a call that never returns is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.retry_policy import upload_timeout
from batchjob.storage.store import Store
from batchjob.worker.watchdog import Watchdog

__all__ = ["MonitoredStore"]

_UPLOAD_TRIES = 2


class MonitoredStore:
    """A store under a watchdog. See `Store`.

    Clients of object stores end an outage by themselves, after a time. A file system may block a call for ever.

    Args:
        store: The store that does the work.
        watchdog: Sees each call as a step.
    """

    def __init__(self, store: Store, watchdog: Watchdog) -> None:
        self._store, self._watchdog, self.uri = store, watchdog, store.uri

    def read(self, key: str) -> ObjectData:
        with self._step("reading", key):
            return self._store.read(key)

    def read_tail(self, key: str, size: int) -> bytes:
        with self._step("reading", key):
            return self._store.read_tail(key, size)

    def read_head(self, key: str, size: int) -> bytes:
        with self._step("reading", key):
            return self._store.read_head(key, size)

    def open(self, key: str) -> BinaryIO:
        with self._step("opening", key):
            return self._store.open(key)

    def stat(self, key: str) -> ObjectInfo:
        with self._watchdog.step(f"a look at {self.uri}/{key}", storage=True):
            return self._store.stat(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._step("listing", prefix):
            listing = self._store.list(prefix)
        while True:
            with self._step("listing", prefix):
                info = next(listing, None)
            if info is None:
                return
            yield info

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        with self._upload_step(key, body):
            return self._store.put_if_absent(key, body)

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        with self._upload_step(key, body):
            return self._store.replace_if_match(key, body, version)

    def delete(self, key: str) -> None:
        with self._step("deletion", key):
            self._store.delete(key)

    def delete_if_match(self, key: str, version: str) -> None:
        with self._step("deletion", key):
            self._store.delete_if_match(key, version)

    def _step(self, action: str, key: str) -> AbstractContextManager[None]:
        return self._watchdog.step(f"the {action} of {self.uri}/{key}", storage=True)

    def _upload_step(self, key: str, body: bytes | Path) -> AbstractContextManager[None]:
        # An upload shows no progress before it ends, and the client may have to repeat it.
        size = body.stat().st_size if isinstance(body, Path) else len(body)
        extra = _UPLOAD_TRIES * (upload_timeout(size) - upload_timeout(0))
        return self._watchdog.step(f"the writing of {self.uri}/{key}", storage=True, extra_seconds=extra)
