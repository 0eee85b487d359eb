"""The control thread's turns: each beats the lease, hears signals, and listens to whoever reports."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, Self, TypeVar

from batchjob.concurrency import DaemonThreadPool, run_in_background
from batchjob.driver.lease import Lease
from batchjob.errors import Temporary, Unavailable
from batchjob.storage.outage import Outage
from batchjob.storage.store import Store

__all__ = ["TICK_SECONDS", "ControlLoop", "StopSignals", "acquire_lease"]

T = TypeVar("T")
TICK_SECONDS = 0.2
_BEAT_SECONDS = 1.0  # that a beat is waited for, so that nothing is done that it would have prevented
_FAREWELL_SECONDS = 3.0


class ControlLoop:
    """What every wait of the control thread goes through.

    The lease is beaten beside it, for a store that does not answer must not keep it from hearing signals. Nobody beats
    unless the turns go on.

    Args:
        lease: beaten in each turn.
        drain: whether a signal has asked to stop.
        output: URI of the output, for the sentence of the end.
        outage: seconds that the lease may go unwritten because the store does not answer.

    Attributes:
        listen: takes in what was reported, waiting so many seconds at most.
        before_stop: called once when a signal has asked to stop, before that ends the run; not in an outage.
    """

    def __init__(self, lease: Lease, signals: StopSignals, output: str, outage_seconds: float = 0.0) -> None:
        self._lease, self._drain, self._output = lease, signals, output
        self._outage = Outage(outage_seconds)
        self._beside = DaemonThreadPool(1, "lease")
        self._beating: Future[None] | None = None
        self._begun = 0.0
        self._stopping = False
        self.collect_events: Callable[[float], object] = time.sleep
        self.on_stop: Callable[[], object] = lambda: None

    @property
    def visibility_check(self) -> tuple[str, str]:
        """See `Lease.witness`."""
        return self._lease.visibility_check

    def install_signal_handlers(self) -> None:
        """Once more: a library may have taken them for itself."""
        self._drain.install()

    def heartbeat(self) -> None:
        """Show life and hear signals, without waiting.

        Raises:
            Temporary: another driver has taken over, a signal has asked to stop, or the store has not answered for too
                long.
        """
        self._show_life()
        if self._drain.requested.is_set() and not self._stopping:
            self._stopping = True
            if not self._outage.is_ongoing:  # or else nothing could be committed
                self.on_stop()
            self._drain.raise_if_stopping(self._output)

    def tick(self, timeout: float = TICK_SECONDS) -> None:
        """Beat, then listen for so long at most. Raises: see `beat`; and what was reported may end the run."""
        self.heartbeat()
        self.collect_events(timeout)

    def run_blocking(self, work: Callable[[], T]) -> T:
        """Do something that may block while the turns go on. What ends them leaves it to itself."""
        return run_in_background(work, lambda: self.tick(0.0))

    def confirm_lease(self) -> None:
        """Look now whether the lease is still ours; an outage is waited for.

        Raises:
            Temporary: another driver has taken over, a signal has asked to stop, or the outage lasts too long.
        """
        run_in_background(lambda: self._outage.retry_until_answered(self._lease.confirm_ownership), self.heartbeat)

    def release_lease(self) -> None:
        """Give the lease back, unless that takes long: then it falls silent by itself."""
        until = time.monotonic() + _FAREWELL_SECONDS
        if self._beating is None or wait([self._beating], _FAREWELL_SECONDS).done:
            wait([self._beside.submit(self._lease.release)], max(0.0, until - time.monotonic()))
        self._beside.shutdown()

    def _show_life(self) -> None:
        if self._beating is None and self._lease.heartbeat_due:
            self._begun = time.monotonic()
            self._beating = self._beside.submit(self._lease.heartbeat)
            wait([self._beating], _BEAT_SECONDS)
        if self._beating is not None and self._beating.done():
            beating, self._beating = self._beating, None
            self._hear(beating)

    def _hear(self, beating: Future[None]) -> None:
        """What became of a beat. Raises what ends the run."""
        try:
            beating.result()
            self._outage.record_answer()
        except Unavailable as error:  # safety does not rest on the lease
            self._outage.record_silence(error, self._begun)


def acquire_lease(store: Store, signals: StopSignals, note: Callable[[str], None]) -> Lease:
    """The lease, however long that takes, while signals are heard; a signal gives back what is taken meanwhile.

    Args:
        store: the output.
        drain: whether a signal has asked to stop.
        note: told while another driver's lease is waited for.

    Raises:
        Temporary: another driver is at work, or a signal has asked to stop.
    """

    def pause(seconds: float) -> None:
        signals.raise_if_stopping(store.uri)
        time.sleep(seconds)

    def take() -> Lease:
        lease = Lease.acquire(store, sleep=pause, note=note)
        if signals.requested.is_set():
            lease.release()
        return lease

    beside = DaemonThreadPool(1, "lease")
    taking = beside.submit(take)
    while not wait([taking], TICK_SECONDS).done:
        if signals.requested.is_set() and not wait([taking], _FAREWELL_SECONDS).done:
            signals.raise_if_stopping(store.uri)
    beside.shutdown()
    return taking.result()


_SIGNALS = signal.SIGTERM, signal.SIGINT


class StopSignals:
    """A context in which the two signals set `asked`. Does nothing outside the main thread."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def install(self) -> None:
        """(Re)install the handlers: Ray takes SIGTERM for itself when it starts.

        It does so below Python, which does not know; its handler calls ours, and aborts the process 3 s later.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            self._before.setdefault(number, signal.signal(number, self._ask))

    def raise_if_stopping(self, output: str) -> None:
        """Raises Temporary where a signal has asked to stop."""
        if self.requested.is_set():
            raise Temporary(f"{output}: stopped by a signal; the same command resumes")

    def _ask(self, *_: object) -> None:
        if self.requested.is_set():
            raise Temporary("stopped at once on the second signal; the same command resumes")
        self.requested.set()
