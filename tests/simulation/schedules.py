"""Random schedules of the simulation; the same seed gives the same schedules."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.simulation.patches import simulated
from tests.simulation.state_machine import DriversMachine

__all__ = ["play", "play_on_two_cores"]

# Hypothesis remembers the schedules of a batch, which slows the next one down.
_BATCH_SIZE = 250
# Distance between the batch numbers of the two processes.
_BATCH_OFFSET = 100_000


def play_on_two_cores(schedules: int, number: int) -> Counter[str]:
    """Run `play` in two processes; two on any machine, so that the seed alone decides the schedules."""
    half = -(-schedules // 2)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(play, [half] * 2, [number] * 2, [0, _BATCH_OFFSET]), Counter())


def play(schedules: int, number: int, batch: int = 0, steps: int = 14) -> Counter[str]:
    """Play schedules, and count how they and the processes in them ended.

    Args:
        schedules: Smallest number of schedules.
        number: Seed.
        batch: Number of the first batch; another number gives other schedules with the same seed.
        steps: Largest number of steps of a schedule.

    Raises:
        AssertionError: An invariant does not hold, or a process did not end as it should. Hypothesis has printed the
            shortest schedule that it found for that.
    """
    tally: Counter[str] = Counter()
    with simulated():
        while (left := schedules - tally["schedules"]) > 0:
            chosen = seed(number * 1_000_003 + batch)(type("Drivers", (DriversMachine,), {"tally": tally}))
            # Hypothesis plays more schedules than `max_examples` asks for.
            run_state_machine_as_test(chosen, settings=_settings(min(left // 2 + 1, _BATCH_SIZE), steps))
            batch += 1
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
