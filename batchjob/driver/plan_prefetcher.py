"""Plan prefetcher: a thread that reads or writes chunks of the plan ahead, so that listing never blocks the driver."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable

from batchjob.plan.chunks import Chunk

__all__ = ["PlanPrefetcher"]

_PREFETCHED_CHUNKS = 4
_PUT_SECONDS = 0.2


class PlanPrefetcher:
    """Iterate over the chunks of a plan in a thread, and keep up to four of them ready.

    Args:
        chunks: Confirmed chunks of the plan, in order; the iterator may block.

    Attributes:
        finished: True once the last chunk has been taken.
    """

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = chunks
        self._queue: queue.Queue[Chunk | BaseException | None] = queue.Queue(_PREFETCHED_CHUNKS)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._prefetch, name="plan-prefetcher", daemon=True)
        self._thread.start()
        self.finished = False

    def next_chunk(self, timeout: float = 0.0) -> Chunk | None:
        """Take the next chunk if it is ready within `timeout` seconds, else return None.

        Raises:
            BaseException: The error that ended the iteration over the chunks.
        """
        try:
            item = self._queue.get(timeout=timeout) if timeout and not self.finished else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        self.finished = item is None
        return item

    def close(self) -> None:
        """Stop the thread after the chunk that it is working on; do not wait for it."""
        self._closed.set()

    def _prefetch(self) -> None:
        try:
            for chunk in self._chunks:
                self._put(chunk)
                # Going on would list and plan the rest of the input, which is no longer needed.
                if self._closed.is_set():
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - next_chunk raises it in the driver's thread
            self._put(error)

    def _put(self, item: Chunk | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_PUT_SECONDS)
                return
            except queue.Full:
                continue
