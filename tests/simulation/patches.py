"""What stands in for threads, clocks, signals and the input while drivers take turns; nothing that decides anything."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, Self, TypeVar, cast
from unittest import mock

import pyarrow as pa
from memory_store import Killed

from batchjob import concurrency, text
from batchjob.driver import control_loop, dispatcher, driver, lease, planner
from batchjob.driver.control_loop import StopSignals
from batchjob.driver.lease import Lease
from batchjob.driver.scheduler import Scheduler
from batchjob.job.job import Job
from batchjob.plan import chunks as chunks_module
from batchjob.plan.chunks import Chunk
from batchjob.sources.source import REF_FIELDS
from batchjob.storage.outage import Outage
from batchjob.storage.store import Store
from batchjob.types import Cursor
from simulation.actor import Actor
from simulation.process import Driver

__all__ = ["CHUNK_ROWS", "simulated"]

R = TypeVar("R")

CHUNK_ROWS = 4
_SILENCE_SECONDS = 4.0
_POLL_SECONDS = 1.0


@contextmanager
def simulated() -> Iterator[None]:
    """As long as this lasts, `driver.run` and `driver.discard` are to be called by a `Driver` that takes turns."""
    patched: list[tuple[Any, str, Any]] = [
        (chunks_module, "CHUNK_ROWS", CHUNK_ROWS),
        (lease, "_POLL_SECONDS", _POLL_SECONDS),
        (concurrency, "DaemonThreadPool", AtOnce),
        (control_loop, "DaemonThreadPool", AtOnce),
        (control_loop, "Outage", partial(Outage, clock=_now, sleep=_sleep)),
        (control_loop, "time", Time),
        (dispatcher, "time", Time),
        (dispatcher, "Scheduler", partial(Scheduler, clock=_now)),
        (driver, "time", Time),
        (driver, "open_store", lambda *_, **__: _driver().store),
        (driver, "PlanPrefetcher", Fed),
        (control_loop, "Lease", Taken),
        (driver, "StopSignals", Asked),
        (planner, "SourceListing", Given),
        (text, "os", SimpleNamespace(environ={})),  # looked through for each message
        (planner, "probe_store", lambda store: None),
        (planner.Planner, "_check_files", lambda self: None),
    ]
    patched += [(Job, name, _once(getattr(Job, name))) for name in ("serialize", "resolved_settings", "fingerprint")]
    with ExitStack() as stack:
        for owner, name, stand_in in patched:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def _once(method: Callable[[Job], R]) -> Callable[[Job], R]:
    """What takes long, and comes out the same each time for the one job there is."""
    found: list[R] = []

    def remembered(self: Job) -> R:
        if not found:
            found.append(method(self))
        return found[0]

    return remembered


class AtOnce:
    """`Threads` whose calls are done when they are submitted, by the one who submits them."""

    def __init__(self, most: int, name: str = "aside") -> None:
        pass

    def submit(self, call: Callable[[], R]) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(call())
        except Killed:
            raise
        except BaseException as error:  # noqa: BLE001 - raised where the result is taken
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        pass


class Fed:
    """A `Feeder` that is asked in vain every other time, so that shards are handed out while the plan is written."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks, self._asked = iter(chunks), 0
        self.finished = False

    def next_chunk(self, timeout: float = 0.0) -> Chunk | None:
        self._asked += 1
        if self.finished or (self._asked % 2 == 0 and not timeout):
            return None
        chunk = next(self._chunks, None)
        self.finished = chunk is None
        return chunk

    def close(self) -> None:
        pass


class Given:
    """An `Input` of the images that the driver is given."""

    fields: tuple[pa.Field, ...] = ()
    version = None

    def __init__(self, source: Any, reader: Any, output_uri: str) -> None:
        self._images = _driver().images

    def check_requirements(self, note: Callable[[str], None]) -> None:
        pass

    def refs(self, after: Cursor) -> Iterator[pa.RecordBatch]:
        names = self._images[after.rows :]
        columns = [names, names, [1] * len(names), ["tag"] * len(names)]
        yield pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, REF_FIELDS, strict=True)], _REFS)

    def check_unchanged(self, planned_version: str | None) -> None:
        pass

    def close(self) -> None:
        pass


_REFS = pa.schema(REF_FIELDS)


class Taken(Lease):
    """A `Lease` on the clock of the driver that takes it."""

    @classmethod
    def acquire(cls, store: Store, **_: Any) -> Lease:
        began, holders = _now(), _driver().holders()
        taken = super().acquire(store, expiry_seconds=_SILENCE_SECONDS, clock=_now, sleep=_sleep)
        patient = _now() - began >= _SILENCE_SECONDS or _driver().stale > 0
        assert patient or not holders & _driver().holders(taken.epoch), f"{_driver().name} did not wait for {holders}"
        _driver().holds(taken)
        return taken


class Asked(StopSignals):
    """A `Drain` that the test asks."""

    def __init__(self) -> None:
        self.requested = _driver().signal = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def install(self) -> None:
        pass


def _driver() -> Driver:
    return cast(Driver, Actor.running)


def _now() -> float:
    return Actor.running.clock


def _sleep(seconds: float) -> None:
    Actor.running.sleep(seconds)


class Time:
    """The part of `time` that drivers use."""

    monotonic = staticmethod(_now)
    sleep = staticmethod(_sleep)
