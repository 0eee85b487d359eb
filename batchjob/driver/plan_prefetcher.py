"""The thread that turns a source into confirmed shards, so that listing never holds up the control loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable

from batchjob.plan.chunks import Chunk

__all__ = ["PlanPrefetcher"]

_CHUNKS_AHEAD = 4


class PlanPrefetcher:
    """Yields confirmed chunks of the plan, read or written a few ahead in a thread of its own."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = chunks
        self._queue: queue.Queue[Chunk | BaseException | None] = queue.Queue(_CHUNKS_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="feeder", daemon=True)
        self._thread.start()
        self.finished = False

    def next_chunk(self, timeout: float = 0.0) -> Chunk | None:
        """The next confirmed chunk if one comes that soon; `finished` is set after the last. Raises what stopped it."""
        try:
            item = self._queue.get(timeout=timeout) if timeout and not self.finished else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        self.finished = item is None
        return item

    def close(self) -> None:
        """Stop after the chunk at hand."""
        self._stop.set()

    def _fill(self) -> None:
        try:
            for chunk in self._chunks:
                self._put(chunk)
                if self._stop.is_set():  # going on would list and plan the whole input for nobody
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - carried to the control loop, which raises it
            self._put(error)

    def _put(self, item: Chunk | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue
