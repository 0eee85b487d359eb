"""Watchdog of a worker: the steps its threads are in, and the one that has shown no progress for too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from batchjob.types import StalledStep

__all__ = ["Watchdog"]


@dataclass(frozen=True)
class _OpenStep:
    name: str
    started: float
    storage: bool
    model: bool
    extra_seconds: float
    last_progress: Callable[[], float] | None


class Watchdog:
    """Steps of all threads of a worker.

    A thread is in one step at a time. After a step within a step it is in the outer one again.

    Example:
        >>> with watchdog.step("a batch in the model", model=True):
        ...     predictor(pixels)  # hangs
        >>> watchdog.stalled_step(60.0, 900.0)  # in another thread, 61 seconds later
        StalledStep(name='a batch in the model', thread=…, seconds=61.0, storage=False, model=True)

    Args:
        clock: Returns a monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[int, _OpenStep] = {}  # by thread

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
        """Enter a step in this thread. A `StepMonitor`.

        Args:
            name: The step in words for people.
            storage: See `StalledStep`.
            model: See `StalledStep`.
            extra_seconds: Time that this step may take beyond the usual limit.
            last_progress: Returns the time of the last sign of progress, by the same clock. It is called from another
                thread.
        """
        thread = threading.get_ident()
        outer = self._open.get(thread)
        self._open[thread] = _OpenStep(name, self._clock(), storage, model, extra_seconds, last_progress)
        try:
            yield
        finally:
            if outer is None:
                del self._open[thread]
            else:
                # The end of the inner step is a sign of progress of the outer one.
                self._open[thread] = replace(outer, started=self._clock())

    def stalled_step(self, seconds: float, storage_seconds: float) -> StalledStep | None:
        """Return the step that exceeds its limit by the most, None if no step does.

        Args:
            seconds: Time that a step may show no progress.
            storage_seconds: The same for a step that uses a store.
        """
        now = self._clock()
        stalled: list[tuple[float, StalledStep]] = []
        for thread, step in self._open.copy().items():
            since = step.started if step.last_progress is None else max(step.started, step.last_progress())
            limit = step.extra_seconds + (storage_seconds if step.storage else seconds)
            excess = now - since - limit
            if excess > 0:
                stalled.append((excess, StalledStep(step.name, thread, now - since, step.storage, step.model)))
        return max(stalled, key=lambda entry: entry[0])[1] if stalled else None
