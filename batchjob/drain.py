"""SIGTERM and Ctrl-C as a request to stop handing out work; a second one is obeyed at once."""

from __future__ import annotations

import signal
import threading
from typing import Any, Self

from batchjob.errors import Temporary

__all__ = ["Drain", "deaf"]

_SIGNALS = signal.SIGTERM, signal.SIGINT


class Drain:
    """A context in which the two signals set `asked`. Does nothing outside the main thread."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def listen(self) -> None:
        """(Re)install the handlers: Ray takes SIGTERM for itself when it starts.

        It does so below Python, which does not know; its handler calls ours, and aborts the process 3 s later.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            self._before.setdefault(number, signal.signal(number, self._ask))

    def heed(self, output: str) -> None:
        """Raises Temporary where a signal has asked to stop."""
        if self.asked.is_set():
            raise Temporary(f"{output}: stopped by a signal; the same command resumes")

    def _ask(self, *_: object) -> None:
        if self.asked.is_set():
            raise Temporary("stopped at once on the second signal; the same command resumes")
        self.asked.set()


def deaf() -> None:
    """Ignore the two signals from now on: all is done and said, and the exit code is to say the same."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
