"""Which steps are under way, and since when they have shown no life: of one that never ends nothing else is heard."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from batchjob.records import Span, Watch

__all__ = ["Step", "Stopwatch", "spent"]


@dataclass(frozen=True)
class Step:
    """One that is under way.

    Attributes:
        name: for people.
        thread: that it is in.
        seconds: since its begin, or its last sign of life.
        storage: it is at a store or waits for one, whose silence is waited for longer.
        model: what the model has in hand may be to blame.
    """

    name: str
    thread: int
    seconds: float
    storage: bool = False
    model: bool = False


@dataclass(frozen=True)
class _Running:
    name: str
    since: float
    storage: bool
    model: bool
    extra: float
    sign: Callable[[], float] | None


class Stopwatch:
    """Steps of all threads of a worker; a thread is in one at a time, and goes on with it after one within.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[int, _Running] = {}

    @contextmanager
    def step(
        self,
        name: str,
        *,
        storage: bool = False,
        model: bool = False,
        extra: float = 0.0,
        sign: Callable[[], float] | None = None,
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
        self._running[thread] = _Running(name, self._clock(), storage, model, extra, sign)
        try:
            yield
        finally:
            if outer is None:
                del self._running[thread]
            else:  # that this one has ended is a sign of life
                self._running[thread] = replace(outer, since=self._clock())

    def overdue(self, seconds: float, at_storage: float) -> Step | None:
        """The step that has shown no life for longest beyond what it may; None as long as there is none.

        Args:
            seconds: that a step may take.
            at_storage: that one at a store may take.
        """
        running, now = self._running.copy(), self._clock()
        late: list[tuple[float, Step]] = []
        for thread, one in running.items():
            since = one.since if one.sign is None else max(one.since, one.sign())
            beyond = now - since - one.extra - (at_storage if one.storage else seconds)
            if beyond > 0:
                late.append((beyond, Step(one.name, thread, now - since, one.storage, one.model)))
        return max(late, key=lambda each: each[0])[1] if late else None


def spent(watch: Watch, stage: str, began: float, images: int) -> float:
    """Seconds since `began`, by `time.perf_counter`, which the watch is told of."""
    ended = time.perf_counter()
    watch(Span(stage, began, ended, os.getpid(), images))
    return ended - began
