"""Replacements of threads, clocks, signals and the input in the simulation; none of them decides anything."""

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

from batchjob import concurrency, text
from batchjob.driver import control_loop, dispatcher, driver, job_files, job_run, lease, planner
from batchjob.driver.control_loop import StopSignals
from batchjob.driver.lease import Lease
from batchjob.driver.scheduler import Scheduler
from batchjob.job.job import Job
from batchjob.plan import chunks as chunks_module
from batchjob.plan.chunks import Chunk
from batchjob.sources.skipped_files import SkippedFiles
from batchjob.sources.source import REF_FIELDS
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.outage import Outage
from batchjob.storage.store import Store
from batchjob.types import Cursor
from tests.simulation.actor import Actor
from tests.simulation.driver_process import SimulatedDriver
from tests.support.memory_store import Killed

__all__ = ["CHUNK_ROWS", "simulated"]

R = TypeVar("R")

CHUNK_ROWS = 4
_EXPIRY_SECONDS = 4.0
_POLL_SECONDS = 1.0


@contextmanager
def simulated() -> Iterator[None]:
    """Replace what simulated drivers cannot use; meanwhile only a `SimulatedDriver` may call the driver's functions."""
    patched: list[tuple[Any, str, Any]] = [
        (chunks_module, "CHUNK_ROWS", CHUNK_ROWS),
        (lease, "_POLL_SECONDS", _POLL_SECONDS),
        (concurrency, "DaemonThreadPool", SynchronousThreadPool),
        (control_loop, "DaemonThreadPool", SynchronousThreadPool),
        (control_loop, "Outage", partial(Outage, clock=_now, sleep=_sleep)),
        (control_loop, "time", SimulatedTime),
        (dispatcher, "time", SimulatedTime),
        (dispatcher, "Scheduler", partial(Scheduler, clock=_now)),
        (driver, "time", SimulatedTime),
        (driver, "open_store", lambda *_, **__: _driver().store),
        (driver, "PlanPrefetcher", SynchronousPrefetcher),
        (driver, "SourceListing", SimulatedListing),
        (job_run, "PlanPrefetcher", SynchronousPrefetcher),
        (job_run, "time", SimulatedTime),
        (job_files, "DaemonThreadPool", SynchronousThreadPool),
        (job_files, "SourceListing", SimulatedListing),
        (control_loop, "Lease", SimulatedLease),
        (driver, "StopSignals", SimulatedSignals),
        (planner, "SourceListing", SimulatedListing),
        (text, "os", SimpleNamespace(environ={})),  # searched for secrets by each message
        (planner, "probe_store", lambda store: None),
        (planner.Planner, "_check_files", lambda self: None),
    ]
    patched += [
        (Job, name, _remember_result(getattr(Job, name))) for name in ("serialize", "resolved_settings", "fingerprint")
    ]
    with ExitStack() as stack:
        for owner, name, replacement in patched:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _remember_result(method: Callable[[Job], R]) -> Callable[[Job], R]:
    """Remember the result of a slow method, which is the same for the only job there is."""
    results: list[R] = []

    def remembered(self: Job) -> R:
        if not results:
            results.append(method(self))
        return results[0]

    return remembered


class SynchronousThreadPool:
    """`DaemonThreadPool` that runs each call when it is submitted, in the caller's thread."""

    def __init__(self, threads: int, name: str = "background") -> None:
        pass

    def submit(self, call: Callable[[], R]) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(call())
        except Killed:
            raise
        except BaseException as error:  # noqa: BLE001 - raised by the future's result
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        pass


class SynchronousPrefetcher:
    """`PlanPrefetcher` that has no chunk every second time, so that shards are dispatched while the plan is written."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks, self._calls = iter(chunks), 0
        self.finished = False

    def next_chunk(self, timeout: float = 0.0) -> Chunk | None:
        self._calls += 1
        if self.finished or (self._calls % 2 == 0 and not timeout):
            return None
        chunk = next(self._chunks, None)
        self.finished = chunk is None
        return chunk

    def close(self) -> None:
        pass


class SimulatedListing:
    """`SourceListing` of the images of the simulated driver."""

    fields: tuple[pa.Field, ...] = ()
    version = None
    files: tuple[ObjectInfo, ...] = ()

    def __init__(self, source: Any, reader: Any, output_uri: str) -> None:
        self._images = _driver().images
        self.skipped = SkippedFiles()

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


class SimulatedLease(Lease):
    """`Lease` with the clock of the driver that takes it."""

    @classmethod
    def acquire(cls, store: Store, **_: Any) -> Lease:
        started, holders = _now(), _driver().holders()
        lease = super().acquire(store, expiry_seconds=_EXPIRY_SECONDS, clock=_now, sleep=_sleep)
        was_patient = _now() - started >= _EXPIRY_SECONDS or _driver().stale > 0
        still_held = holders & _driver().holders(lease.epoch)
        assert was_patient or not still_held, f"{_driver().name} did not wait for {holders}"
        _driver().record_lease(lease)
        return lease


class SimulatedSignals(StopSignals):
    """`StopSignals` that the test sets."""

    def __init__(self) -> None:
        self.requested = _driver().signal = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def install(self) -> None:
        pass


def _driver() -> SimulatedDriver:
    return cast(SimulatedDriver, Actor.running)


def _now() -> float:
    return Actor.running.clock


def _sleep(seconds: float) -> None:
    Actor.running.sleep(seconds)


class SimulatedTime:
    """Replacement of the module `time`, as far as drivers use it."""

    monotonic = staticmethod(_now)
    sleep = staticmethod(_sleep)
