"""A driver's process: `driver.run`, `driver.discard` or a retry from its first call to its end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

from memory_store import MemoryStore

from batchjob.driver import driver
from batchjob.driver.lease import Lease
from batchjob.driver.progress import NoProgress
from batchjob.errors import BatchjobError
from batchjob.job.job import Job
from batchjob.report.run_result import RunResult
from batchjob.storage.objects import ObjectInfo
from simulation.actor import Actor, Client
from simulation.crew import Crew

__all__ = ["Driver"]

_LEASE = "_batchjob/lease/"


class Driver(Actor):
    """One run of a job, one retry of it, or one discard of its output.

    Args:
        name: for people.
        shared: the objects that all see.
        job: to run; None to discard what lies there.
        images: that it lists.
        workers: that it has.
        mended: see `Crew`.
        retries: it tries error rows again.

    Attributes:
        crew: its workers.
        outcome: of a run that came to its end.
        discards_before: plans that had been discarded when it began.
        signal: set to ask it to stop, once it listens.
    """

    def __init__(
        self,
        name: str,
        shared: MemoryStore,
        job: Job | None,
        images: list[str],
        workers: int,
        mended: threading.Event,
        retries: bool = False,
    ) -> None:
        self.crew = Crew(self, shared, workers, mended)
        self.retries = retries
        self.store = _Watched(shared, self)
        self.images, self._job = images, job
        self.outcome: RunResult | None = None
        self.signal = threading.Event()
        self.discards = job is None
        self.discards_before = 0
        super().__init__(name, self._run_or_discard)

    @property
    def fault(self) -> BatchjobError | None:
        """What it ended with. Raises what is no error of ours."""
        if self.error is not None and not isinstance(self.error, BatchjobError):
            raise self.error
        return self.error

    def holders(self, but: int = 0) -> set[str]:
        """The newest lease but that epoch, as it stands now; nothing where its owner has let go."""
        objects, ours = self.store._disk.objects, f"{_LEASE}{but:010d}.json"
        there = {key: blob for key, blob in objects.items() if key.startswith(_LEASE) and key != ours}
        return {key for key in sorted(there)[-1:] if not json.loads(there[key].data)["released"]}

    def holds(self, lease: Lease) -> None:
        """It has taken the lease."""
        self.crew.epoch = self.crew.seen = lease.epoch

    def sees(self, epochs: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
        """What a look at the lease shows it."""
        found = list(epochs)
        names = [stat.uri.removeprefix(_LEASE).removesuffix(".json") for stat in found]
        self.crew.seen = max([self.crew.seen, *map(int, names)])
        return iter(found)

    def _run_or_discard(self) -> None:
        if self._job is None:
            driver.discard("memory://out")
        else:
            self.outcome = driver.run(
                self._job, lambda: self.crew, allow_empty=True, progress=NoProgress(), retry=self.retries
            )


class _Watched(Client):
    """A client that remembers what its driver has seen of the lease."""

    def __init__(self, shared: MemoryStore, driver: Driver) -> None:
        super().__init__(shared, driver)
        self._driver = driver

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if prefix != _LEASE:
            return super().list(prefix)
        self._driver.crew.looked = self._driver.clock
        return self._driver.sees(super().list(prefix))
