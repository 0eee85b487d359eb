"""Control loop: each tick renews the lease, checks for stop signals and collects worker events."""

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
# A heartbeat is waited for this long, so that nothing is done that its answer would have prevented.
_HEARTBEAT_WAIT_SECONDS = 1.0
_RELEASE_SECONDS = 3.0
# SIGHUP: the terminal was closed. A program under `nohup` starts with it ignored, and goes on.
_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


class ControlLoop:
    """Everything that must go on while the driver's thread waits for something.

    The lease is renewed in a thread of its own: a store that does not answer must not keep the driver from noticing
    stop signals. It is renewed only as long as the loop ticks.

    Example of the ticks of a run whose store is slow (tick 0.2 s, heartbeat every 2 s):
        0.0 s  tick: start a heartbeat, wait for it up to 1 s, collect worker events
        1.2 s  tick: the heartbeat is still unanswered; check signals, collect worker events
        1.4 s  tick: the heartbeat is answered; `another driver has taken the lease` would be raised here

    Args:
        lease: Lease to renew.
        signals: Stop signals.
        output: URI of the output, for messages.
        outage_seconds: Time that the lease may stay unwritten because the store does not answer, in seconds.
        note: Called with lines for the user.

    Attributes:
        lease, signals: The lease and the stop signals, as given.
        collect_events: Called in each tick with the longest time to wait for events, in seconds. Sleeps by default.
        on_stop: Called once when a stop signal has come, before that ends the run; not while the store is out, for
            then nothing could be committed.
    """

    def __init__(
        self,
        lease: Lease,
        signals: StopSignals,
        output: str,
        outage_seconds: float = 0.0,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.lease, self.signals, self._output, self._note = lease, signals, output, note
        self._outage = Outage(outage_seconds)
        self._lease_thread = DaemonThreadPool(1, "lease")
        self._pending_heartbeat: Future[None] | None = None
        self._heartbeat_started = 0.0
        self._stopping = False
        self.collect_events: Callable[[float], object] = time.sleep
        self.on_stop: Callable[[], object] = lambda: None

    def heartbeat(self) -> None:
        """Renew the lease if it is due and check for stop signals; wait for neither store nor workers.

        Raises:
            Temporary: Another driver has taken the lease, or a stop signal has come.
            Unavailable: The store has not answered for too long.
        """
        self._renew_lease()
        if self.signals.requested.is_set() and not self._stopping:
            self._stopping = True
            self._note("stop signal: what is done is kept; a second one (Ctrl-C again) stops at once")
            if not self._outage.is_ongoing:
                self.on_stop()
            self.signals.raise_if_stopping(self._output)

    def tick(self, timeout: float = TICK_SECONDS) -> None:
        """Make one tick: heartbeat, then collect worker events for `timeout` seconds at most.

        Raises:
            BatchjobError: See `heartbeat`; or an event that ends the run.
        """
        self.heartbeat()
        self.collect_events(timeout)

    def run_blocking(self, work: Callable[[], T]) -> T:
        """Run work that may block in another thread while the loop ticks; an error of a tick abandons the work."""
        return run_in_background(work, lambda: self.tick(0.0))

    def confirm_lease(self) -> None:
        """Check now that the lease is still this driver's; wait out an outage of the store.

        Raises:
            Temporary: Another driver has taken the lease, or a stop signal has come.
            Unavailable: The store has not answered for too long.
        """
        run_in_background(lambda: self._outage.retry_until_answered(self.lease.confirm_ownership), self.heartbeat)

    def release_lease(self, is_unused: Callable[[], bool] = lambda: False) -> None:
        """Give the lease back; if that takes more than 3 s, let it expire instead.

        Args:
            is_unused: See `Lease.release`.
        """
        deadline = time.monotonic() + _RELEASE_SECONDS
        if self._pending_heartbeat is None or wait([self._pending_heartbeat], _RELEASE_SECONDS).done:
            released = self._lease_thread.submit(lambda: self.lease.release(is_unused=is_unused))
            wait([released], max(0.0, deadline - time.monotonic()))
        self._lease_thread.shutdown()

    def _renew_lease(self) -> None:
        if self._pending_heartbeat is None and self.lease.heartbeat_due:
            self._heartbeat_started = time.monotonic()
            self._pending_heartbeat = self._lease_thread.submit(self.lease.heartbeat)
            wait([self._pending_heartbeat], _HEARTBEAT_WAIT_SECONDS)
        if self._pending_heartbeat is not None and self._pending_heartbeat.done():
            answered, self._pending_heartbeat = self._pending_heartbeat, None
            try:
                answered.result()
                self._outage.record_answer()
            except Unavailable as error:
                # Safety does not rest on the lease, so an outage may last for a while.
                self._outage.record_silence(error, self._heartbeat_started)


class StopSignals:
    """Context in which SIGTERM, SIGINT and SIGHUP ask the run to stop; a second signal stops it at once.

    Outside the main thread it does nothing, for Python allows no signal handlers there.

    Attributes:
        requested: Set once a signal has come.
    """

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def install(self) -> None:
        """Install the handlers, or install them again."""
        # Ray takes SIGTERM for itself when it starts. It does so below Python, which does not know; its handler calls
        # ours, and aborts the process 3 s later.
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous_handlers.setdefault(number, signal.signal(number, self._handle_signal))

    def raise_if_stopping(self, output: str) -> None:
        """Raise Temporary, with the URI of the output, if a signal has come."""
        if self.requested.is_set():
            raise Temporary(f"{output}: stopped by a signal; the same command resumes")

    def _handle_signal(self, *_: object) -> None:
        if self.requested.is_set():
            raise Temporary("stopped at once on the second signal; the same command resumes")
        self.requested.set()


def acquire_lease(store: Store, signals: StopSignals, note: Callable[[str], None]) -> Lease:
    """Take the lease, however long that takes, while stop signals are noticed.

    Args:
        store: The output.
        signals: Stop signals; a lease that is taken after one came is given back.
        note: Called with a line for the user before a wait for another driver's lease.

    Raises:
        Temporary: Another driver is at work, or a stop signal has come.
    """

    def sleep(seconds: float) -> None:
        signals.raise_if_stopping(store.uri)
        time.sleep(seconds)

    def acquire() -> Lease:
        lease = Lease.acquire(store, sleep=sleep, note=note)
        if signals.requested.is_set():
            lease.release()
        return lease

    thread = DaemonThreadPool(1, "lease")
    acquired = thread.submit(acquire)
    while not wait([acquired], TICK_SECONDS).done:
        if signals.requested.is_set() and not wait([acquired], _RELEASE_SECONDS).done:
            signals.raise_if_stopping(store.uri)
    thread.shutdown()
    return acquired.result()
