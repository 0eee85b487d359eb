"""Whether a cluster still lives, asked in a thread of its own: calls of its library may hang and not say so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

__all__ = ["Pulse"]

Node = TypeVar("Node")

_PULSE_SECONDS = 5.0
_SILENT_SECONDS = 30.0  # without a head, Ray ends the driver's process after 60, with an exit code of its own


class Pulse(Generic[Node]):
    """Asks every few seconds.

    Args:
        ask: for the nodes that live; may hang, or raise.
        nodes: the first answer.

    Attributes:
        nodes: the last answer.
    """

    def __init__(self, ask: Callable[[], Sequence[Node]], nodes: Sequence[Node]) -> None:
        self._ask, self.nodes = ask, nodes
        self._answered = time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def lost(self) -> str | None:
        """What befell the cluster, if something did."""
        if not self.nodes:
            return "has lost all its nodes"
        silent = time.monotonic() - self._answered
        return f"has not answered for {silent:.0f} s" if silent > _SILENT_SECONDS else None

    def stop(self) -> None:
        self._stopped.set()

    def _beat(self) -> None:
        while not self._stopped.wait(_PULSE_SECONDS):
            with suppress(Exception):  # no answer, whatever it raises
                self.nodes = self._ask()
                self._answered = time.monotonic()
