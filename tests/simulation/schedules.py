"""Plays so many schedules, the same ones for the same seed."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from simulation.machine import Drivers
from simulation.patches import simulated

__all__ = ["play"]

_AT_ONCE = 250  # what hypothesis remembers of one lot slows the next schedule down


def play(schedules: int, number: int, steps: int = 14) -> Counter[str]:
    """Play at least so many schedules of up to so many steps; how they went, and how the processes in them ended.

    Raises:
        AssertionError: a law does not hold, or somebody came to another end than it should; hypothesis has printed
            the shortest schedule that it found for it.
    """
    tally: Counter[str] = Counter()
    lot = 0
    with simulated():
        while (left := schedules - tally["schedules"]) > 0:
            chosen = seed(number * 1_000_003 + lot)(type("Drivers", (Drivers,), {"tally": tally}))
            run_state_machine_as_test(
                chosen, settings=_settings(min(left // 2 + 1, _AT_ONCE), steps)
            )  # it plays more than it is told
            lot += 1
    return tally


def _settings(schedules: int, steps: int) -> settings:
    return settings(
        max_examples=schedules,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
