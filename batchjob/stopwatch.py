"""Which steps are under way, and since when: of one that never ends nothing else is heard."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Step", "Stopwatch"]


@dataclass(frozen=True)
class Step:
    """One that is under way: its name, the thread it is in, and for how many seconds."""

    name: str
    thread: int
    seconds: float


class Stopwatch:
    """Steps of all threads of a worker; a thread has one at a time.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[int, tuple[str, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Around a step."""
        thread = threading.get_ident()
        self._running[thread] = name, self._clock()
        try:
            yield
        finally:
            del self._running[thread]

    def longest(self) -> Step | None:
        """The step that has been under way for longest, if there is one."""
        running, now = self._running.copy(), self._clock()
        steps = [Step(name, thread, now - since) for thread, (name, since) in running.items()]
        return max(steps, key=lambda step: step.seconds, default=None)
