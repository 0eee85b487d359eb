"""Long simulation: 10,000 schedules of two drivers, three workers and a discard, with every fault of the store."""

from __future__ import annotations

import os

import pytest

from tests.simulation import play_on_two_cores
from tests.support.figures import Figure

SCHEDULES = int(os.environ.get("BATCHJOB_SCHEDULES") or 10_000)


@pytest.mark.timeout(1800)
def test_every_image_has_one_row_in_every_schedule(seed: int, figure: Figure) -> None:
    tally = play_on_two_cores(SCHEDULES, seed)
    assert tally["schedules"] >= SCHEDULES
    figure(
        "every image exactly once",
        f"{tally['schedules']:,} simulated schedules (seed {seed}): {tally['commits']:,} commits, 0 missing, 0 twice; "
        f"{tally['killed']:,} processes killed, {tally['Temporary'] + tally['Unavailable']:,} ended with 75",
    )
