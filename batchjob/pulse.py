"""Whether a cluster still lives, asked in a thread of its own: calls of its library may hang and not say so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Pulse"]

_PULSE_SECONDS = 5.0
_SILENT_SECONDS = 30.0  # without a head, Ray ends the driver's process after 60, with an exit code of its own


class Pulse:
    """Asks every few seconds.

    Args:
        nodes: counts those that live; may hang, or raise.
    """

    def __init__(self, nodes: Callable[[], int]) -> None:
        self._count = nodes
        self._answered, self._nodes = time.monotonic(), 1
        self._stopped = threading.Event()
        threading.Thread(target=self._ask, name="pulse", daemon=True).start()

    def lost(self) -> str | None:
        """What befell the cluster, if something did."""
        if not self._nodes:
            return "has lost all its nodes"
        silent = time.monotonic() - self._answered
        return f"has not answered for {silent:.0f} s" if silent > _SILENT_SECONDS else None

    def stop(self) -> None:
        self._stopped.set()

    def _ask(self) -> None:
        while not self._stopped.wait(_PULSE_SECONDS):
            with suppress(Exception):  # no answer, whatever it raises
                self._nodes = self._count()
                self._answered = time.monotonic()
