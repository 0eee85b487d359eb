"""The control thread's turns: each beats the lease, hears signals, and listens to whoever reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from batchjob.drain import Drain
from batchjob.errors import Temporary
from batchjob.lease import Lease
from batchjob.parallel import aside

__all__ = ["TURN_SECONDS", "Turns"]

T = TypeVar("T")
TURN_SECONDS = 0.2


class Turns:
    """What every wait of the control thread goes through.

    Args:
        lease: beaten in each turn.
        drain: whether a signal has asked to stop.
        output: URI of the output, for the sentence of the end.

    Attributes:
        listen: takes in what was reported, waiting so many seconds at most.
        before_stop: called once when a signal has asked to stop, before that ends the run.
    """

    def __init__(self, lease: Lease, drain: Drain, output: str) -> None:
        self._lease, self._drain, self._output = lease, drain, output
        self._stopping = False
        self.listen: Callable[[float], object] = time.sleep
        self.before_stop: Callable[[], object] = lambda: None

    @property
    def witness(self) -> tuple[str, str]:
        """See `Lease.witness`."""
        return self._lease.witness

    def listen_to_signals(self) -> None:
        """Once more: a library may have taken them for itself."""
        self._drain.listen()

    def beat(self) -> None:
        """Show life and hear signals, without waiting.

        Raises:
            Temporary: another driver has taken over, or a signal has asked to stop.
        """
        self._lease.beat()
        if self._drain.asked.is_set() and not self._stopping:
            self._stopping = True
            self.before_stop()
            raise Temporary(f"{self._output}: stopped by a signal; the same command resumes")

    def turn(self, seconds: float = TURN_SECONDS) -> None:
        """Beat, then listen for so long at most. Raises: see `beat`; and what was reported may end the run."""
        self.beat()
        self.listen(seconds)

    def during(self, work: Callable[[], T]) -> T:
        """Do something that may block while the turns go on. What ends them leaves it to itself."""
        return aside(work, lambda: self.turn(0.0))
