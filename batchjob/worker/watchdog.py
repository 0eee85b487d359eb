"""Which steps are under way, and since when they have shown no life: of one that never ends nothing else is heard."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.retry_policy import upload_timeout
from batchjob.storage.store import Store
from batchjob.types import StalledStep

__all__ = ["MonitoredStore", "Watchdog"]


@dataclass(frozen=True)
class _OpenStep:
    name: str
    since: float
    storage: bool
    model: bool
    extra: float
    sign: Callable[[], float] | None


class Watchdog:
    """Steps of all threads of a worker; a thread is in one at a time, and goes on with it after one within.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[int, _OpenStep] = {}

    @contextmanager
    def step(
        self,
        name: str,
        *,
        storage: bool = False,
        model: bool = False,
        extra_seconds: float = 0.0,
        last_progress: Callable[[], float] | None = None,
    ) -> Iterator[None]:
        """Around a step.

        Args:
            name: for people.
            storage: see `Step`.
            model: likewise.
            extra: seconds that it may take beyond what its like may.
            sign: when, by the clock, it last showed life; asked from another thread.
        """
        thread = threading.get_ident()
        outer = self._running.get(thread)
        self._running[thread] = _OpenStep(name, self._clock(), storage, model, extra_seconds, last_progress)
        try:
            yield
        finally:
            if outer is None:
                del self._running[thread]
            else:  # that this one has ended is a sign of life
                self._running[thread] = replace(outer, since=self._clock())

    def stalled_step(self, seconds: float, storage_seconds: float) -> StalledStep | None:
        """The step that has shown no life for longest beyond what it may; None as long as there is none.

        Args:
            seconds: that a step may take.
            at_storage: that one at a store may take.
        """
        running, now = self._running.copy(), self._clock()
        late: list[tuple[float, StalledStep]] = []
        for thread, one in running.items():
            since = one.since if one.sign is None else max(one.since, one.sign())
            beyond = now - since - one.extra - (storage_seconds if one.storage else seconds)
            if beyond > 0:
                late.append((beyond, StalledStep(one.name, thread, now - since, one.storage, one.model)))
        return max(late, key=lambda each: each[0])[1] if late else None


_TRIES = 2


class MonitoredStore:
    """The same store. Its clients wait for one that is away, but not for ever; a file system may keep a call so long.

    Args:
        store: that is asked.
        stopwatch: shows for how long.
    """

    def __init__(self, store: Store, watchdog: Watchdog) -> None:
        self._store, self._stopwatch, self.uri = store, watchdog, store.uri

    def read(self, key: str) -> ObjectData:
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

    def stat(self, key: str) -> ObjectInfo:
        with self._stopwatch.step(f"a look at {self.uri}/{key}", storage=True):
            return self._store.stat(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        step = partial(self._stopwatch.step, f"the listing of {self.uri}/{prefix}", storage=True)
        with step():
            listed = self._store.list(prefix)
        while True:
            with step():
                found = next(listed, None)
            if found is None:
                return
            yield found

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        with self._writing(key, body):
            return self._store.put_if_absent(key, body)

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
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
        extra = _TRIES * (upload_timeout(size) - upload_timeout(0))
        return self._stopwatch.step(f"the writing of {self.uri}/{key}", storage=True, extra_seconds=extra)
