"""Drivers and workers that take turns at one store: the real rooms, stopped before each call, in drawn order.

Every process is a thread that runs only when it is told to, from one call of the store to the next; each has a clock of
its own. What is replaced stands in `patches.py`; all else is the code that runs in earnest.
"""

from __future__ import annotations

from simulation.schedules import play, play_on_two_cores

__all__ = ["play", "play_on_two_cores"]
