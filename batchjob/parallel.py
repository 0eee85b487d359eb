"""Calls in daemon threads, which never hold up the end of the process, while the caller goes on showing life."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

__all__ = ["aside", "side_by_side"]

T = TypeVar("T")
R = TypeVar("R")

_LOOK_SECONDS = 0.2
_AHEAD = 4  # calls begun or waiting for each thread: enough to keep all busy, few enough for any number of items


def aside(work: Callable[[], R], meanwhile: Callable[[], object] = lambda: None) -> R:
    """Does one thing that may block. `meanwhile` is called every 0.2 s; what it raises leaves the call to itself."""
    (found,) = side_by_side(lambda _: work(), [None], meanwhile, threads=1)
    return found


def side_by_side(
    work: Callable[[T], R], items: Iterable[T], meanwhile: Callable[[], object] = lambda: None, *, threads: int = 16
) -> Iterator[R]:
    """What `work` makes of each item, in their order; raises what the first failed call raised.

    Args:
        work: called in other threads.
        items: any number of them; only a few are taken ahead of the result that is due.
        meanwhile: called here, before each result and every 0.2 s while one is awaited. What it raises ends the
            iteration: no further call is begun, those that run are left to themselves.
        threads: at most.
    """
    crew = _Crew(work, threads)
    try:
        for item in items:
            crew.put(item)
            while crew.full or crew.first_done:
                yield crew.next(meanwhile)
        while crew.pending:
            yield crew.next(meanwhile)
    finally:
        crew.leave()


class _Crew(Generic[T, R]):
    """Threads that serve one queue, and the calls whose results are still due."""

    def __init__(self, work: Callable[[T], R], most: int) -> None:
        self._work, self._most, self._threads = work, most, 0
        self._todo: queue.SimpleQueue[tuple[Future[R], T] | None] = queue.SimpleQueue()
        self.pending: deque[Future[R]] = deque()

    @property
    def full(self) -> bool:
        return len(self.pending) >= self._most * _AHEAD

    @property
    def first_done(self) -> bool:
        return bool(self.pending) and self.pending[0].done()

    def put(self, item: T) -> None:
        if self._threads < self._most:
            self._threads += 1
            threading.Thread(target=self._serve, name="aside", daemon=True).start()
        future: Future[R] = Future()
        self.pending.append(future)
        self._todo.put((future, item))

    def next(self, meanwhile: Callable[[], object]) -> R:
        meanwhile()
        while not wait([self.pending[0]], _LOOK_SECONDS).done:
            meanwhile()
        return self.pending.popleft().result()

    def leave(self) -> None:
        for future in self.pending:
            future.cancel()
        for _ in range(self._threads):
            self._todo.put(None)

    def _serve(self) -> None:
        while (call := self._todo.get()) is not None:
            future, item = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._work(item))
            except BaseException as error:  # noqa: BLE001 - raised where the result is taken
                future.set_exception(error)
