"""Simulation of drivers and workers that share one store, in a random order of their calls.

Every process is a thread that runs only when it is advanced, from one call of the store to the next, and has a clock of
its own. `patches.py` replaces threads, clocks, signals and the input; all other code is the real one.
"""

from __future__ import annotations

from tests.simulation.schedules import play, play_on_two_cores

__all__ = ["play", "play_on_two_cores"]
