"""Simulated process of a driver: a run, a retry or a discard, from its first call of the store to its end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

from batchjob.driver import driver
from batchjob.driver.lease import Lease
from batchjob.driver.progress import NoProgress
from batchjob.errors import BatchjobError
from batchjob.job.job import Job
from batchjob.report.run_result import RunResult
from batchjob.storage.objects import ObjectInfo
from tests.simulation.actor import Actor
from tests.simulation.simulated_pool import SimulatedPool
from tests.support.memory_store import MemoryStore

__all__ = ["SimulatedDriver"]

_LEASE = "_batchjob/lease/"


class SimulatedDriver(Actor):
    """Process that runs a job, retries it, or discards its output.

    Args:
        name: Name, for messages.
        shared: Objects that all processes see.
        job: Job to run; None to discard the output.
        images: Names of the images that it lists.
        workers: Number of its workers.
        repaired: Set once the bad images are good; see `SimulatedPool`.
        is_retry: Whether it retries error rows.

    Attributes:
        pool: Its workers.
        result: Result of a run that came to its end.
        discards_at_start: Number of plans that had been discarded when it began.
        signal: Stop request, once the driver catches signals.
    """

    def __init__(
        self,
        name: str,
        shared: MemoryStore,
        job: Job | None,
        images: list[str],
        workers: int,
        repaired: threading.Event,
        is_retry: bool = False,
    ) -> None:
        self.pool = SimulatedPool(self, shared, workers, repaired)
        self.is_retry = is_retry
        self.store = _LeaseWatchingClient(shared, self)
        self.images, self._job = images, job
        self.result: RunResult | None = None
        self.signal = threading.Event()
        self.is_discard = job is None
        self.discards_at_start = 0
        super().__init__(name, self._run_or_discard)

    @property
    def batchjob_error(self) -> BatchjobError | None:
        """Error that ended the process; raises any error that is no BatchjobError."""
        if self.error is not None and not isinstance(self.error, BatchjobError):
            raise self.error
        return self.error

    def holders(self, except_epoch: int = 0) -> set[str]:
        """Return the key of the newest lease except that epoch; nothing if its owner has released it."""
        objects, own_key = self.store.state.objects, f"{_LEASE}{except_epoch:010d}.json"
        leases = {key: stored for key, stored in objects.items() if key.startswith(_LEASE) and key != own_key}
        return {key for key in sorted(leases)[-1:] if not json.loads(leases[key].data)["released"]}

    def record_lease(self, lease: Lease) -> None:
        """Remember the lease that the driver has taken."""
        self.pool.epoch = self.pool.newest_epoch = lease.epoch

    def record_listing(self, epochs: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
        """Remember the newest epoch that the driver has seen."""
        infos = list(epochs)
        names = [info.uri.removeprefix(_LEASE).removesuffix(".json") for info in infos]
        self.pool.newest_epoch = max([self.pool.newest_epoch, *map(int, names)])
        return iter(infos)

    def _run_or_discard(self) -> None:
        if self._job is None:
            driver.discard("memory://out")
        else:
            self.result = driver.run(
                self._job, lambda: self.pool, allow_empty=True, progress=NoProgress(), retry=self.is_retry
            )


class _LeaseWatchingClient(MemoryStore):
    """Client that remembers which epochs of the lease its driver has seen, and when."""

    def __init__(self, shared: MemoryStore, driver: SimulatedDriver) -> None:
        super().__init__(shared.state, driver.pause_before_call)
        self._driver = driver

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if prefix != _LEASE:
            return super().list(prefix)
        self._driver.pool.last_look = self._driver.clock
        return self._driver.record_listing(super().list(prefix))
