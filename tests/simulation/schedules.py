"""Plays so many schedules, the same ones for the same seed."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from simulation.machine import Drivers
from simulation.patches import simulated

__all__ = ["play", "play_on_two_cores"]

_AT_ONCE = 250  # what hypothesis remembers of one lot slows the next schedule down
_FAR = 100_000  # lots between the first of one process and that of the other


def play_on_two_cores(schedules: int, number: int) -> Counter[str]:
    """`play` in two processes: two on any machine, so that the seed decides all."""
    half = -(-schedules // 2)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(play, [half] * 2, [number] * 2, [0, _FAR]), Counter())


def play(schedules: int, number: int, lot: int = 0, steps: int = 14) -> Counter[str]:
    """Play at least so many schedules of up to so many steps; how they went, and how the processes in them ended.

    Args:
        schedules: how many.
        number: the seed.
        lot: from which on; others with the same seed are other schedules.
        steps: in each, at most.

    Raises:
        AssertionError: a law does not hold, or somebody came to another end than it should; hypothesis has printed
            the shortest schedule that it found for it.
    """
    tally: Counter[str] = Counter()
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
